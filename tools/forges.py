"""Which forge teaches what? Train the demonstration's Phase A with one forge, judge it on the pairs of several; one JSON line each.

tools/forges.py train OUT NAME [--checkout DIR] [--unseen man] [--seed 0] [--forge JSON] [--augment] [--steps N]   NAME.pt and NAME.pairs in OUT; DIR: another checkout of this repository, whose package is used
tools/forges.py judge OUT [--models a,b] [--pairs a,b]                                                            every model on every set of pairs: AUC and the share of pairs in which the fake scores higher
"""
import argparse,json,sys
from pathlib import Path
import torch

def tuples(v): return tuple(map(tuples, v)) if isinstance(v, list) else v

def train(a):
    "Fixed schedule, last weights, one thread; 60 pairs of the unseen person are kept for judging"
    from deepfake_nb.batches import PairDataset,pair_loader
    from deepfake_nb.stores import build_store
    from deepfake_nb.journal import Journal
    from deepfake_nb.losses import stf_loss
    from deepfake_nb.evaluation import judge_pairs
    from deepfake_nb.presets import find_videos,settings,store_folder
    from deepfake_nb.stf_mamba import build_stf_mamba
    from deepfake_nb.training import pair_epochs,train as run
    cfg = settings('demo', steps=a.steps); store = build_store(find_videos(''), store_folder('', cfg), size=cfg.size).store()
    who = {t.group for t in store.tracks if t.label==0}; kw = dict(qp=cfg.qp)|{k:tuples(v) for k,v in json.loads(a.forge).items()}
    learn,watch,test = (PairDataset(store, g, cfg.length, seed=s, **kw) for g,s in ((sorted(who-{a.unseen}), a.seed), ([a.unseen], a.seed+10_000), ([a.unseen], 20_000)))
    torch.manual_seed(a.seed); model = build_stf_mamba(cfg.model, cfg.weights)
    def loss(m, b):
        if a.augment: from deepfake_nb.device_forge import after_codec; b = after_codec(b, a.seed)
        return stf_loss(m(b.frames), b.label, b.pair, m.cfg.hll_loss, cfg.hll_weight)
    h = run(model, pair_epochs(learn, cfg), loss, cfg.training(a.seed), evaluate=lambda m: judge_pairs(m, watch, cfg.eval_pairs, 'cpu'), journal=Journal(''), progress=False)
    torch.save(model.state_dict(), a.out/f'{a.name}.pt'); torch.save([(b.frames.clone(), b.label, b.pair) for b in pair_loader(test, 4, 60)], a.out/f'{a.name}.pairs')
    print(json.dumps(dict(trained=a.name, unseen=a.unseen, seed=a.seed, steps=len(h.steps), forge=kw, augment=a.augment, curve=[round(e['auc'], 3) for _,e in h.evals])), flush=True)

def judge(a):
    from deepfake_nb.backbones import standardise
    from deepfake_nb.evaluation import colours
    from deepfake_nb.metrics import auc,bootstrap
    from deepfake_nb.presets import settings
    from deepfake_nb.stf_mamba import build_stf_mamba
    cfg = settings('demo'); names = lambda given,kind: given.split(',') if given else sorted(p.stem for p in a.out.glob(f'*.{kind}'))
    for name in names(a.models, 'pt'):
        model = build_stf_mamba(cfg.model, cfg.weights).eval(); model.load_state_dict(torch.load(a.out/f'{name}.pt', weights_only=True))
        for pairs in names(a.pairs, 'pairs'):
            with torch.inference_mode(): rows = [(model.score(standardise(f, *colours(model))), y, p) for f,y,p in torch.load(a.out/f'{pairs}.pairs', weights_only=True)]
            s,y,p = (torch.cat(c).numpy() for c in zip(*rows)); lo,hi = bootstrap('auc', s, y, p, seed=0)
            won = [float((s[(p==k)&(y==1)]>s[(p==k)&(y==0)]).mean()) for k in sorted(set(p.tolist()))]
            print(json.dumps(dict(model=name, pairs=pairs, auc=round(float(auc(s, y)), 3), lo=round(lo, 3), hi=round(hi, 3), won=round(sum(won)/len(won), 3), n=len(won))), flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); sub = p.add_subparsers(required=True)
    t = sub.add_parser('train'); t.set_defaults(go=train); t.add_argument('out', type=Path); t.add_argument('name'); t.add_argument('--checkout', default=str(Path(__file__).resolve().parent.parent)); t.add_argument('--unseen', default='man')
    t.add_argument('--seed', type=int, default=0); t.add_argument('--forge', default='{}', help='fields of `SBIConfig` as JSON'); t.add_argument('--augment', action='store_true'); t.add_argument('--steps', type=int)
    j = sub.add_parser('judge'); j.set_defaults(go=judge, checkout=str(Path(__file__).resolve().parent.parent)); j.add_argument('out', type=Path); j.add_argument('--models'); j.add_argument('--pairs')
    a = p.parse_args(); a.out.mkdir(parents=True, exist_ok=True); sys.path.insert(0, a.checkout); torch.set_num_threads(1); a.go(a)

if __name__=='__main__': main()
