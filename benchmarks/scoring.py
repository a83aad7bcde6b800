"A video from file to score: milliseconds a second of video on one core, by step and by model. The last line is one JSON object."
import argparse,json,shutil,tempfile,time
from dataclasses import replace
from pathlib import Path
import cv2,torch
from deepfake_nb.batches import window_loader
from deepfake_nb.faces import face_tracks
from deepfake_nb.manifest import Manifest,Video
from deepfake_nb.pack import sample
from deepfake_nb.scoring import Detector,scores
from deepfake_nb.specialists.base import SpecialistConfig
from deepfake_nb.specialists.team import build_specialist
from deepfake_nb.stf_mamba import STFConfig,build_stf_mamba
from deepfake_nb.stores import build_store
from deepfake_nb.video import VideoFile,write_video

BARE = dict(stages=0, mixer='none', ffn='none', dwt=False, hll_gate=False, hll_loss='none')

def models(): # with weights of the demonstration's size; what they say does not matter here
    demo = STFConfig.phase_a('demo')
    yield Detector(build_stf_mamba(demo, 'pack'), 'Phase A, 4 clips of 4 frames', 'STFMamba', 4),4
    yield Detector(build_stf_mamba(STFConfig.phase_b('demo'), 'pack'), 'Phase B, 4 clips of 4 frames', 'STFMamba', 4),4
    yield Detector(build_stf_mamba(replace(demo, **BARE), 'pack'), 'images, 32 frames', 'STFMamba', 1),32
    for code in ('BG','CM','RR','LL','TM'):
        m = build_specialist(SpecialistConfig(code, 'tf_efficientnet_lite0'), 'pack'); yield Detector(m, f'{code}, 4 clips', 'Specialist', m.module.needs.frames, m.module.needs.extras),4

def best(f, n): # CPU seconds, the least of n runs, and the last result
    took = []
    for _ in range(n): t = time.process_time(); res = f(); took.append(time.process_time()-t)
    return min(took),res

def film(path, height, frames):
    images,_ = VideoFile(sample('woman')).read(0, frames); w = round(images[0].shape[1]*height/images[0].shape[0]/2)*2
    return write_video(path, [cv2.resize(i, (w,height), interpolation=cv2.INTER_CUBIC) for i in images])

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__); p.add_argument('--frames', type=int, default=75); p.add_argument('--rounds', type=int, default=2); p.add_argument('--heights', default='360,720'); a = p.parse_args()
    cv2.setNumThreads(1); torch.set_num_threads(1); place = Path(tempfile.mkdtemp()); res = {}
    for h in map(int, a.heights.split(',')):
        path = film(place/f'{h}.mp4', h, a.frames); video = Video('bench', 'real', 'as_is', path.name, path, 'woman', 0); seconds = VideoFile(path).seconds
        ms = lambda s: round(1e3*s/seconds, 1)
        decode,frames = best(lambda: list(VideoFile(path)), a.rounds); row = dict(decode=ms(decode)); kept = {}
        for native in (False, True):
            def store(): shutil.rmtree(place/f'{native}', ignore_errors=True); return build_store(Manifest([video]), place/f'{native}', native=native).store()
            follow,_ = best(lambda: list(face_tracks(iter(frames), native=native)), a.rounds); kept[native] = whole,_ = best(store, a.rounds)
            row |= {f"faces{', native' if native else ''}":ms(follow), f"keep{', native' if native else ''}":ms(max(0, whole-decode-follow))}
        for d,most in models():
            whole,faces = kept['native' in d.extras]; load = lambda: window_loader(faces, d.length, most, 8, extras=d.extras)
            read,_ = best(lambda: list(load()), a.rounds); said,_ = best(lambda: scores(d, load()), a.rounds)
            row[d.name] = dict(read=ms(read), model=ms(said-read), whole=ms(whole+said), times_real_time=round(seconds/(whole+said), 2))
        res[f'{h}p'] = row; print(f'{h}p, {seconds:.1f} s: ', {k:v for k,v in row.items() if not isinstance(v, dict)}); [print(f'  {k}: {v}') for k,v in row.items() if isinstance(v, dict)]
    shutil.rmtree(place)
    print(json.dumps(dict(unit='CPU ms a second of video, one core', frames=a.frames, **res)))
