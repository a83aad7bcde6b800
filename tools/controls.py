"""The hidden give-aways of the forge, measured on any videos of real faces (chapter 44): a table, then one JSON line with all of it.

tools/controls.py                                     the sample pack
tools/controls.py --videos DIR --pairs 400 --seed 0   people of your own, a folder each or a film each
"""
import argparse,json,sys
import cv2,numpy as np,torch
from deepfake_nb.blend import VideoSBI
from deepfake_nb.stores import build_store
from deepfake_nb.clips import ClipSampler
from deepfake_nb.controls import PROBES,by_draw,controls,leaks,readings
from deepfake_nb.presets import find_videos,settings,store_folder

CHEAP = {k:f for k,f in PROBES.items() if k!='codec'}
FORGES = { # name -> settings of `VideoSBI`, readers
    'published, before the codec':(dict(balance=False, resample=1., look=False, codec=False), CHEAP),
    'default, before the codec':(dict(look=False, codec=False), CHEAP),
    'default, filmed and coded':({}, PROBES),
    'ratio 0, filmed and coded':(dict(ratios=(0.,), least=0.), CHEAP)}

def pairs(store, n, length, seed, keep, **kw):
    "Pairs of a store one by one; their blends are kept in `keep`"
    draw,sbi = ClipSampler([t for t in store.tracks if not t.label], length),VideoSBI(**kw)
    for i in range(n):
        clip = store.read(*draw(seed, 0, i), length); p = sbi(clip, np.random.default_rng([seed, i]))
        keep.append(p.draws['blend']); yield p,clip.group

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--videos', default='', help='folder of real videos; empty: the sample pack'); p.add_argument('--pairs', type=int, default=400); p.add_argument('--length', type=int, default=4, help='frames of a clip')
    p.add_argument('--seed', type=int, default=0); p.add_argument('--preset', default='demo'); p.add_argument('--threads', type=int, default=1)
    a = p.parse_args(); torch.set_num_threads(a.threads); cv2.setNumThreads(a.threads)
    cfg = settings(a.preset); store = build_store(find_videos(a.videos), store_folder(a.videos, cfg), size=cfg.size).store()
    rows,broken = [],[]
    for forge,(kw,probes) in FORGES.items():
        blends = []; r = readings(pairs(store, a.pairs, a.length, a.seed, blends, **kw), probes); d = controls(r, seed=a.seed)
        face = by_draw(r.values['sharpness, face'], [b.side for b in blends])['mean'].round(3).to_dict()
        print(f'\n{forge} (face sharper by, log: {face})'); print(d.round(3).to_string(), flush=True)
        rows += [dict(forge=forge, probe=k, **v) for k,v in d.round(4).to_dict('index').items()]
        if forge.startswith('default'): broken += [f'{k}: {d.auc[k]:.3f} ({forge})' for k in leaks(d)]
    print(json.dumps(dict(videos=len(store.tracks), people=len({t.group for t in store.tracks}), pairs=a.pairs, length=a.length, seed=a.seed, size=cfg.size, interval='95 %, pairs drawn within these people', leaks=broken, rows=rows)))
    return bool(broken)

if __name__=='__main__': sys.exit(main())
