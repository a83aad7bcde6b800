"How often the 95 % intervals of chapter 31d hold the truth: every world, size and AUC, both ways and the rule that chooses; kept in records/coverage.json"
import argparse,json,sys,time
from pathlib import Path
import numpy as np
from deepfake_nb import metrics
from deepfake_nb.checkpoints import commit
from deepfake_nb.intervals import auc,binormal,both_ways,few_errors,pairs,people,simulate,strata

ROOT = Path(__file__).resolve().parent.parent
GRID = [(binormal, n, a) for n in (20,50,100,200,1000) for a in (.75,.95,.99)]+[(people, n, a) for n in (10,20,50,100) for a in (.75,.95)]

SEEDS = 20 # of resamples: they do not look at the scores, so test sets may share them, and drawing them is most of the cost

def remembered(draws):
    "The resamples of `draws`, kept while kinds of units stay the same"
    kept = {}
    def f(kind, n, rng):
        key = kind.tobytes(),n,rng.bit_generator.state['state']['state']
        if key not in kept:
            if len(kept)>=2*SEEDS: kept.clear()
            kept[key] = draws(kind, n, rng)
        return kept[key]
    return f

def ways(resamples):
    "Both ways, what the rule makes of them, and where units repeat the naive ones over rows"
    def f(s, y, u, seed):
        seed %= SEEDS; res = both_ways(s, y, u, seed, resamples); kind = strata(y, u)[1]; repeat = len(kind)<len(y)
        res['rule'] = res['logit' if few_errors(auc(s, y), pairs(kind), repeat) else 'bootstrap']
        if repeat: res |= {f'{w} over videos':v for w,v in both_ways(s, y, np.arange(len(s)), seed, resamples).items()}
        return res
    return f

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--draws', type=int, default=2000, help='test sets of each kind'); p.add_argument('--seed', type=int, default=0)
    p.add_argument('--resamples', type=int, default=1000, help='of each bootstrap'); p.add_argument('--out', type=Path, default=ROOT/'records'/'coverage.json')
    a = p.parse_args(); rows,start = [],time.monotonic()
    metrics.draws = remembered(metrics.draws)
    for world,n,area in GRID:
        rows += simulate(ways(a.resamples), world, n, area, a.draws, a.seed)
        print(f'{time.monotonic()-start:6.0f} s  {world.__name__} {n}, AUC {area}:', {r['way']:r['held']/r['draws'] for r in rows if (r['world'],r['n'],r['area'])==(world.__name__,n,area)}, file=sys.stderr, flush=True)
    kept = dict(command=f'tools/coverage.py --draws {a.draws} --seed {a.seed} --resamples {a.resamples}', draws=a.draws, seed=a.seed, resamples=a.resamples, seeds_of_resamples=SEEDS, level=.95, commit=commit(), numpy=np.__version__,
                rows=[r|dict(width=round(r['width'], 5)) for r in rows])
    a.out.write_text(json.dumps(kept).replace(' "rows": [', '\n "rows": [\n  ').replace('}, {', '},\n  {')+'\n')
    print(json.dumps({f"{r['world']} {r['n']} {r['area']} {r['way']}":r['held']/r['draws'] for r in rows}))

if __name__=='__main__': main()
