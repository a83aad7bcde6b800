"""What the demonstration's training learns about people it never saw: folds and seeds, one JSON line each, then the mean and the worst.

tools/folds.py                                   each person of the sample pack left out once, seeds 0 1 2
tools/folds.py --videos DIR --unseen a,b,c       one fold of your own: everybody else is trained on
"""
import argparse,json,statistics,sys
import torch
from deepfake_nb.ablation import fold
from deepfake_nb.stores import build_store
from deepfake_nb.clips import real_groups
from deepfake_nb.presets import find_videos,settings,store_folder

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--videos', default=''); p.add_argument('--unseen', default='', help='names with commas; empty: each person in turn')
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2]); p.add_argument('--preset', default='demo'); p.add_argument('--steps', type=int); p.add_argument('--threads', type=int, default=1)
    a = p.parse_args(); torch.set_num_threads(a.threads)
    cfg = settings(a.preset, steps=a.steps)
    store = build_store(find_videos(a.videos), store_folder(a.videos, cfg), size=cfg.size).store()
    folds = [a.unseen.split(',')] if a.unseen else [[g] for g in real_groups(store)]
    rows = []
    for who in folds:
        for s in a.seeds: rows.append(fold(store, who, s, cfg)); print(json.dumps({k:v for k,v in rows[-1].items() if k!='scores'}), flush=True)
    auc = [r['auc'] for r in rows]
    print(json.dumps(dict(runs=len(auc), mean=statistics.mean(auc), worst=min(auc), start=statistics.mean(r['start'] for r in rows))))

if __name__=='__main__': sys.exit(main())
