"""What the demonstration's training learns about people it never saw: folds and seeds, one JSON line each, then the mean and the worst.

tools/folds.py                                   each person of the sample pack left out once, seeds 0 1 2
tools/folds.py --videos DIR --unseen a,b,c       one fold of your own: everybody else is trained on
"""
import argparse,json,statistics,sys,tempfile
import torch
from deepfake_nb.batches import PairDataset,pair_loader
from deepfake_nb.chunks import build_store
from deepfake_nb.evaluation import judge_pairs
from deepfake_nb.journal import Journal
from deepfake_nb.losses import phase_a_loss
from deepfake_nb.plan import find_videos,real_groups,settings,store_folder
from deepfake_nb.stf_mamba import build_stf_mamba
from deepfake_nb.training import by_epochs,train

def fold(store, unseen, seed, cfg):
    "Train on everybody else, with the fixed schedule; judge its last weights on the unseen"
    trained = [g for g in real_groups(store) if g not in unseen]
    data = lambda who,s: PairDataset(store, who, cfg.length, seed=s, qp=cfg.qp)
    learn,watch,judged,known = data(trained, seed),data(unseen, seed+10_000),data(unseen, seed+20_000),data(trained, seed+30_000)
    torch.manual_seed(seed); model = build_stf_mamba(cfg.model, cfg.weights)
    loader = by_epochs(lambda epoch,first: pair_loader(learn, cfg.pairs, cfg.epoch, epoch, first*cfg.pairs, cfg.workers), cfg.epoch//cfg.pairs)
    h = train(model, loader, lambda m,b: phase_a_loss(m(b.frames), b.label, b.pair, cfg.hll_weight), cfg.training(seed),
              evaluate=lambda m: judge_pairs(m, watch, cfg.eval_pairs), journal=Journal(tempfile.mkdtemp()), progress=False)
    r,k = judge_pairs(model, judged, cfg.judge_pairs, seed=seed),judge_pairs(model, known, cfg.eval_pairs)
    return dict(unseen=unseen, trained=len(trained), seed=seed, steps=cfg.steps, pairs=r['pairs'], start=h.evals[0][1]['auc'], auc=r['auc'], lo=r['lo'], hi=r['hi'],
                curve=[round(e['auc'], 3) for _,e in h.evals], on_the_trained=k['auc'])

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
        for s in a.seeds: rows.append(fold(store, who, s, cfg)); print(json.dumps(rows[-1]), flush=True)
    auc = [r['auc'] for r in rows]
    print(json.dumps(dict(runs=len(auc), mean=statistics.mean(auc), worst=min(auc), start=statistics.mean(r['start'] for r in rows))))

if __name__=='__main__': sys.exit(main())
