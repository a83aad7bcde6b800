"How fast are pairs made? Milliseconds of CPU for one pair of `T` frames at 224 on one core, part by part; the last line is JSON."
import argparse,json,statistics,time
import cv2
from deepfake_nb.blend import _lines,_soft,_warp,_window,blend_target,draw_blend,face_size,make_pair,self_blend
from deepfake_nb.damage import apply_codec,apply_look,draw_codec,draw_look
from deepfake_nb.faces import face_tracks
from deepfake_nb.pack import sample
from deepfake_nb.video import VideoFile
import numpy as np

def cpu_ms(f, n):
    "Median CPU milliseconds of `f(seed)` over `n` seeds, after one for warming up"
    f(0); times = []
    for seed in range(n): t = time.process_time(); f(seed); times.append(1000*(time.process_time()-t))
    return statistics.median(times)

def parts(frames, landmarks):
    "Name -> function of a seed: each part of a pair alone, then the whole"
    size,middle = face_size(landmarks),landmarks.mean((0,1))
    draw = lambda s: draw_blend(np.random.default_rng(s))
    def placed(s):
        d = draw(s); lines = _lines(landmarks, d, middle, size)
        return d,lines,_window(lines, max(d.blur)*size, *frames.shape[1:3])
    ready = [placed(s) for s in range(64)]
    real = blend_target(frames, draw(0))
    look,codec = (lambda s: draw_look(np.random.default_rng(s))),(lambda s: draw_codec(np.random.default_rng(s)))
    return dict(outlines=placed, masks=lambda s: _soft(ready[s][1], ready[s][0], size, *ready[s][2]), source=lambda s: _warp(frames, ready[s][0], middle, size, *ready[s][2]),
                target=lambda s: blend_target(frames, draw(s)), self_blend=lambda s: self_blend(frames, landmarks, draw(s), real),
                look_both=lambda s: [apply_look(frames, look(s)) for _ in range(2)], codec_both=lambda s: [apply_codec(frames, codec(s)) for _ in range(2)],
                pair_bare=lambda s: make_pair(frames, landmarks, s, codec=False, look=False), pair_look=lambda s: make_pair(frames, landmarks, s, codec=False), pair=lambda s: make_pair(frames, landmarks, s))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--frames', type=int, default=16); p.add_argument('--seeds', type=int, default=40); a = p.parse_args()
    cv2.setNumThreads(1)
    track = next(face_tracks(VideoFile(sample('woman')), max_length=a.frames))
    ms = {name:cpu_ms(f, min(a.seeds, 64)) for name,f in parts(track.crops, track.landmarks).items()}
    for name,v in ms.items(): print(f'{name:12} {v:7.1f} ms  {v/ms["pair"]:6.1%} of a pair')
    print(json.dumps(dict(benchmark='pairs', frames=a.frames, size=track.crops.shape[1], seeds=a.seeds, cpu_ms={k:round(v, 2) for k,v in ms.items()},
                          pairs_per_second_per_core=round(1000/ms['pair'], 2), codec_share=round(ms['codec_both']/ms['pair'], 3))))
