"""What the forge costs on one core: blending by mode, step by step; whole training pairs against the codec alone, in turns; the memory of a worker. On CUDA also the forge of the device, and whether six workers keep a Phase A step fed.
The last line is JSON."""
import argparse,json,resource,statistics,subprocess,sys,tempfile,time
import cv2,numpy as np
from types import SimpleNamespace
from deepfake_nb import blend as B
from deepfake_nb.stores import build_store
from deepfake_nb.damage import CodecDraw,apply_codec,apply_look,draw_codec,draw_look
from deepfake_nb.manifest import pack_manifest
from deepfake_nb.faces import face_tracks
from deepfake_nb.pack import sample
from deepfake_nb.video import VideoFile

BARE = dict(look=False, codec=False, rate=0.)

def cpu(f, n):
    "CPU milliseconds of `f(seed)` for each of `n` seeds, after two for warming up"
    f(0); f(1); times = []
    for seed in range(n): t = time.process_time(); f(seed); times.append(1000*(time.process_time()-t))
    return times

def clip_at(size, T):
    "The woman of the sample pack, and the man in the car: (frames, landmarks, times) each"
    res = []
    for name in ('woman','carphone'):
        t = next(face_tracks(VideoFile(sample(name)), source=name, size=size, max_length=T))
        res.append(SimpleNamespace(frames=t.crops, landmarks=t.landmarks, times=t.times))
    return res

def rate(clips, n, **kw):
    "Frames a second of one core, mean over `n` draws, redrawn blends included"
    sbi = B.VideoSBI(**BARE, **kw); ms = cpu(lambda s: sbi(clips[s%2], s), n)
    return round(1000*len(clips[0].frames)/statistics.mean(ms), 1)

def modes(size, T, n):
    "By mode: the mix that training uses, without and with the two dear ways to mix, then each alone"
    clips = clip_at(size, T)
    cases = {'alpha, all hulls, drifts and ratios':dict(blends='alpha'), 'the same, never resampled':dict(blends='alpha', resample=0.), 'the same, always resampled':dict(blends='alpha', resample=1.),
             'as trained (alpha .85, poisson .05, pyramid .1)':{}, 'poisson':dict(blends='poisson'), 'pyramid':dict(blends='pyramid')}
    return {k:rate(clips, n, **kw) for k,kw in cases.items()}

def steps(size, T, n):
    "Median CPU ms of each step of a blend, T frames"
    clip = clip_at(size, T)[0]; f,l = clip.frames,clip.landmarks; F,M = B.face_size(l),l.mean((0,1))
    draws = [B.draw_blend(np.random.default_rng(s), B.SBIConfig(ratios=1., resample=1.)) for s in range(n)]
    lines = [B.seam(l, d, M, F)[0] for d in draws]; wins = [B._window(x, 2*max(d.soft)*F, size, size) for x,d in zip(lines, draws)]
    s0,w0 = B.places(draws[0], F)[0],wins[0]; made = B.self_blend(f, l, draws[0])
    cut = lambda c: [np.ascontiguousarray(x[w0[0]:w0[1],w0[2]:w0[3]]) for x in c]
    s,t,a = cut(made.fake),cut(made.real),cut(made.mask)
    parts = dict(outlines_and_walk=lambda i: B.seam(l, draws[i], M, F), masks=lambda i: B.soft_masks(lines[i], draws[i], F, *wins[i]), one_view=lambda i: B.transform(f, draws[i]),
        target_resampled=lambda i: B.put(f, B.places(draws[i], F)[1], M, F, 0, size, 0, size), source_resampled=lambda i: B.put(f, B.places(draws[i], F)[0], M, F, *wins[i]),
        check_of_the_pair=lambda i: B.effect(made.real, made.fake, made.mask), **{f'mix_{k}':lambda i,mix=mix: [mix(*x, 1.) for x in zip(s, t, a)] for k,mix in B.MIXERS.items()})
    return {k:round(statistics.median(cpu(g, n)), 2) for k,g in parts.items()}

def whole(size, T, n):
    "Read from the store, blend, encode and decode both, against the codec alone at the same draws: taken in turns"
    with tempfile.TemporaryDirectory() as d:
        store = build_store(pack_manifest(['woman','man','carphone']), d, size=size).store(); sbi = B.VideoSBI(**BARE)
        tracks = [t for t in store.tracks if t.frames>=T]; spent = dict(read=[], blend=[], codec=[], look=[])
        def clock(key, f): t = time.process_time(); r = f(); spent[key].append(1000*(time.process_time()-t)); return r
        for i in range(-2, n):
            if i==0: spent = {k:[] for k in spent}
            t,rng = tracks[i%len(tracks)],np.random.default_rng(i+2)
            clip = clock('read', lambda: store.read(t.key, int(rng.integers(t.frames-T+1)), T)); pair = clock('blend', lambda: sbi(clip, i+2))
            code = CodecDraw(int(rng.integers(23, 41)), 'veryfast'); clock('codec', lambda: [apply_codec(c, code) for c in (pair.real, pair.fake)])
            look = draw_look(rng); clock('look', lambda: [apply_look(c, look) for c in (pair.real, pair.fake)])
    ms = {k:statistics.mean(v) for k,v in spent.items()}; pair = ms['read']+ms['blend']+ms['codec']
    return dict(ms={k:round(v, 2) for k,v in ms.items()}, pairs_per_s=round(1000/pair, 2), codec_alone_per_s=round(1000/ms['codec'], 2), ratio=round(ms['codec']/pair, 3), codec_share=round(ms['codec']/pair, 3),
                ratio_with_the_camera=round(ms['codec']/(pair+ms['look']), 3), pairs=n, frames=T, size=size)

CHILD = """
import sys,resource,torch
if sys.argv[1]!='torch':
    from deepfake_nb.batches import PairDataset,_alone
    from deepfake_nb.clips import FaceStore
    _alone(0); ds = PairDataset(FaceStore(sys.argv[1]), ['woman','man','carman'], 16)
    for i in range(int(sys.argv[2])): ds[0,i]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024)
"""

def memory(n):
    "Largest resident MB of a process that only imports torch, and of a worker after `n` pairs of 16 frames at 224"
    with tempfile.TemporaryDirectory() as d:
        build_store(pack_manifest(['woman','man','carphone']), d, size=224)
        run = lambda *a: int(subprocess.run([sys.executable, '-c', CHILD, *map(str, a)], capture_output=True, text=True, check=True).stdout)
        torch,worker = run('torch'),run(d, n)
    return dict(torch_mb=torch, worker_mb=worker, above_mb=worker-torch)

def on_cuda(T=32, size=224, pairs=2):
    "Forge on the device; the rate at which six workers deliver pairs; a Phase A step at the same size"
    import torch
    from deepfake_nb.batches import PairDataset,normalise,pair_loader
    from deepfake_nb.device_forge import forge_batch
    from deepfake_nb.losses import stf_loss
    from deepfake_nb.stf_mamba import STFConfig,build_stf_mamba
    clip = clip_at(size, T)[0]; n = len(clip.frames); draws = [B.draw_blend(np.random.default_rng(s)) for s in range(8)]
    frames,marks = torch.from_numpy(clip.frames).cuda()[None].repeat(8, 1, 1, 1, 1),np.repeat(clip.landmarks[None], 8, 0)
    def timed(f, k): f(); torch.cuda.synchronize(); t = time.perf_counter(); [f() for _ in range(k)]; torch.cuda.synchronize(); return (time.perf_counter()-t)/k
    res = dict(device=torch.cuda.get_device_name(), forge_frames_per_s=round(8*n/timed(lambda: forge_batch(frames, marks, draws), 10)))
    with tempfile.TemporaryDirectory() as d:
        store = build_store(pack_manifest(['woman','man','carphone']), d, size=size).store(); ds = PairDataset(store, ['woman','man','carman'], T)
        it = iter(pair_loader(ds, pairs, 200, workers=6)); [next(it) for _ in range(12)]; t = time.perf_counter(); batches = [next(it) for _ in range(40)]; res['loader_batch_s'] = round((time.perf_counter()-t)/40, 4); del it
    model = build_stf_mamba(STFConfig.phase_a('full'), '').cuda().train(); opt = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    def step():
        b = batches[0].to('cuda')
        with torch.autocast('cuda', torch.bfloat16): loss = stf_loss(model(b.frames), b.label, b.pair, model.cfg.hll_loss, .1)['loss']
        opt.zero_grad(); loss.backward(); opt.step()
    res['step_s'] = round(timed(step, 10), 4); res['loader_keeps_up'] = res['loader_batch_s']<=res['step_s']
    return res

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', type=int, default=256, help='of the crops that are blended'); p.add_argument('--frames', type=int, default=16); p.add_argument('--seeds', type=int, default=100); p.add_argument('--pairs', type=int, default=60)
    a = p.parse_args(); cv2.setNumThreads(1)
    res = dict(benchmark='forge', size=a.size, frames=a.frames, seeds=a.seeds, frames_per_s=modes(a.size, a.frames, a.seeds), step_ms=steps(a.size, a.frames, min(a.seeds, 40)), pair=whole(224, 16, a.pairs), memory=memory(a.pairs))
    for k,v in res['frames_per_s'].items(): print(f'{k:46} {v:8.1f} frames/s')
    for k,v in res['step_ms'].items(): print(f'{k:46} {v:8.2f} ms for {a.frames} frames')
    print(*(f'{k}: {v}' for k,v in (*res['pair'].items(), *res['memory'].items())), sep='\n')
    import torch
    res['cuda'] = on_cuda() if torch.cuda.is_available() else 'not measured: no CUDA device here'
    print(json.dumps(res))

if __name__=='__main__': main()
