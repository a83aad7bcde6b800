"What preparing costs: a zip against loose files, minutes of film at 360p and 1080p step by step, spans, and fakes cut like their originals. Ratios are of one run, pair by pair; times are CPU time of one core."
import json,statistics,sys,tempfile,time,zipfile
from dataclasses import replace
from pathlib import Path
import cv2,numpy as np
from deepfake_nb.clips import encode_crop
from deepfake_nb.faces import Tracker,face_tracks
from deepfake_nb.manifest import Video
from deepfake_nb.pack import sample
from deepfake_nb.sources import open_film
from deepfake_nb.stores import Settings,store_video
from deepfake_nb.video import VideoFile,write_video

ROUNDS = int(sys.argv[1]) if len(sys.argv)>1 else 3
cv2.setNumThreads(1)

def cpu(work):
    "Seconds of CPU time, of this process"
    t = time.process_time(); work(); return time.process_time()-t

def films(folder):
    "The woman's clip, 240 frames (10 s): 640 x 360, and the same drawn at 1920 x 1080"
    frames = VideoFile(sample('woman')).read(0, 240)[0]
    yield '360p',write_video(folder/'a360.mp4', frames, rate=24, qp=24),write_video(folder/'f360.mp4', [cv2.GaussianBlur(f, (0,0), .6) for f in frames], rate=24, qp=24)
    big = lambda f: cv2.resize(f, (1920,1080), interpolation=cv2.INTER_CUBIC)
    yield '1080p',write_video(folder/'a1080.mp4', map(big, frames), rate=24, qp=24),write_video(folder/'f1080.mp4', (big(cv2.GaussianBlur(f, (0,0), .6)) for f in frames), rate=24, qp=24)

def zips(folder, path, n=12):
    "Median over pairs of (time loose / time in the zip): bytes, sha256 and 16 frames decoded; both orders of the pair in turn"
    loose = [folder/f'{i}.mp4' for i in range(n)]
    for p in loose: p.write_bytes(path.read_bytes())
    res = {}
    for how,kind in (('stored', zipfile.ZIP_STORED), ('deflated', zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(folder/f'{how}.zip', 'w', kind) as z:
            for p in loose: z.write(p, f'part/{p.name}')
        row = Video('b', 'real', 'as_is', 'x', path, 'x', 0)
        def read(v):
            with open_film(v) as film:
                for f in film.frames:
                    if f.index==15: break
        ratios = []
        for k in range(ROUNDS*n):
            a,b = replace(row, path=loose[k%n]),replace(row, path=folder/f'{how}.zip', member=f'part/{k%n}.mp4')
            if k%2: tb,ta = cpu(lambda: read(b)),cpu(lambda: read(a))
            else: ta,tb = cpu(lambda: read(a)),cpu(lambda: read(b))
            ratios.append(ta/tb)
        res[how] = round(statistics.median(ratios), 3)
    return res

def steps(path):
    "Milliseconds of CPU for a frame of 240, one step after the other added"
    def drain(x):
        for _ in x: pass
    def track(): t = Tracker(); drain(map(t, VideoFile(path)))
    row,res,before = Video('b', 'real', 'as_is', 'x', path, 'x', 0),{},0.
    def store():
        with tempfile.TemporaryDirectory() as d: store_video(row, d)
    for name,work in (('decode', lambda: drain(VideoFile(path, wanted=lambda i: False))), ('to RGB', lambda: drain(VideoFile(path))), ('detect and mesh', track), ('cut', lambda: drain(face_tracks(VideoFile(path))))):
        t = min(cpu(work) for _ in range(ROUNDS))
        res[name],before = round(1000*(t-before)/240, 2),t
    crops = [c for t in face_tracks(VideoFile(path)) for c in t.crops]
    res['compress'] = round(1000*min(cpu(lambda: [encode_crop(c) for c in crops]) for _ in range(ROUNDS))/len(crops), 2)
    before = min(cpu(store) for _ in range(ROUNDS))
    return res|{'in all':round(1000*before/240, 2), 'clips of 10 s a minute':round(60/before, 1)}

def variants(real, fake):
    "CPU seconds of a whole store: all frames, four spans of 32; a fake alone and like its original"
    res = {}
    with tempfile.TemporaryDirectory() as d:
        row = Video('b', 'real', 'as_is', 'x', real, 'x', 0); forged = replace(row, method='f', name='f', path=fake, label=1, original=row.key)
        for name,kw in (('all', {}), ('spans', dict(spans=4, span=32))):
            s = Settings(**kw); own = replace(s, boxes='own')
            t = min(cpu(lambda: store_video(row, Path(d)/f'{name}{i}', s)) for i in range(ROUNDS)); first = store_video(row, Path(d)/f'{name}0', s)
            alone = min(cpu(lambda: store_video(forged, Path(d)/f'{name}{i}', own)) for i in range(ROUNDS))
            like = min(cpu(lambda: store_video(forged, Path(d)/f'{name}{i}', s, replace(first))) for i in range(1) )
            for i in range(1, ROUNDS): first_i = store_video(row, Path(d)/f'{name}{i}', s); like = min(like, cpu(lambda: store_video(forged, Path(d)/f'{name}{i}', s, first_i)))
            res[name] = dict(real=round(t, 3), fake_alone=round(alone, 3), fake_like_original=round(like, 3), clips_a_minute=round(60/t, 1))
    return res

if __name__=='__main__':
    out = dict(rounds=ROUNDS)
    with tempfile.TemporaryDirectory() as d:
        for name,real,fake in films(Path(d)):
            if name=='360p': out['speed of a zip over loose files'] = zips(Path(d), real); print(out)
            out[name] = dict(steps=steps(real), store=variants(real, fake)); print(name, out[name])
    print(json.dumps(out))
