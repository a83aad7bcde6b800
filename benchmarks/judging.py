"A thousand resamples of the judge's metrics over 5,000 videos, beside scikit-learn in a loop, and DeLong: CPU seconds and memory. The last line is one JSON object."
import argparse,json,statistics,time,tracemalloc
import numpy as np
from sklearn.metrics import average_precision_score,roc_auc_score
from deepfake_nb.intervals import auc_interval,binormal,compare_auc,delong,summary
from deepfake_nb.metrics import METRICS,bootstraps,eer,tpr_at_fpr

MOST = 1. # s, for all metrics
OF_ALL = (roc_auc_score, average_precision_score, lambda y,s: eer(s, y), lambda y,s: tpr_at_fpr(s, y, .01), lambda y,s: tpr_at_fpr(s, y, .05))

def timed(f):
    t = time.process_time(); f() # of this process: what others do beside it does not count
    return time.process_time()-t

def loop(s, y, n, fs):
    "What one writes first: the rows of each resample, and scikit-learn's functions on them"
    rng,two = np.random.default_rng(0),[np.flatnonzero(y==c) for c in (0,1)]
    for _ in range(n):
        i = np.concatenate([rng.choice(k, len(k)) for k in two])
        for f in fs: f(y[i], s[i])

def peak(f):
    "MB that the arrays of `f` need at most"
    tracemalloc.start(); f(); mb = tracemalloc.get_traced_memory()[1]/2**20; tracemalloc.stop()
    return mb

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--videos', type=int, default=5000); p.add_argument('--resamples', type=int, default=1000); p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--loop', type=int, default=20, help='resamples of the loop; its time is scaled up')
    a = p.parse_args(); s,y,u = binormal(np.random.default_rng(0), a.videos, .9); b = s+np.random.default_rng(1).normal(size=len(s)); n = a.resamples
    calls = {'all metrics, s':lambda: bootstraps(METRICS, s, y, u, n), 'AUC alone, s':lambda: bootstraps(['auc'], s, y, u, n), 'summary, s':lambda: summary(s, y, u, n),
             'AUC and its interval, s':lambda: auc_interval(s, y, u, n), 'DeLong, s':lambda: delong(s, y), 'two models by DeLong, s':lambda: compare_auc(s, b, y),
             'all metrics, scores with ties, s':lambda: bootstraps(METRICS, np.round(s, 1), y, u, n)}
    times = {k:[] for k in calls}|{'loop':[], 'loop of AUC':[]}
    for _ in range(a.rounds+1): # in turn, so that noise hits all alike; the first round warms up
        for k,f in calls.items(): times[k].append(timed(f))
        for k,fs in (('loop',OF_ALL), ('loop of AUC',OF_ALL[:1])): times[k].append(timed(lambda: loop(s, y, a.loop, fs))*n/a.loop)
    res = {k:statistics.median(v[1:]) for k,v in times.items() if not k.startswith('loop')}
    res |= {'all metrics, least s':min(times['all metrics, s'][1:]), 'scikit-learn loop, all metrics, s':statistics.median(times['loop'][1:]), 'scikit-learn loop, AUC, s':statistics.median(times['loop of AUC'][1:])}
    res |= {'loop over ours, all metrics':statistics.median(l/o for l,o in zip(times['loop'][1:], times['all metrics, s'][1:])), 'loop over ours, AUC':statistics.median(l/o for l,o in zip(times['loop of AUC'][1:], times['AUC alone, s'][1:]))}
    ten = [v.repeat(10) for v in (s, y, u)]; start = time.perf_counter(); calls['all metrics, s'](); res['all metrics, s by the clock'] = time.perf_counter()-start
    res |= {'memory of all metrics, MB':peak(calls['all metrics, s']), 'memory of AUC, MB':peak(calls['AUC alone, s']), 'memory with 10 clips a video, MB':peak(lambda: bootstraps(METRICS, *ten, n)),
            'one table of weights for 10 clips a video, MB':n*len(ten[0])*8/2**20}
    res = {k:round(v, 4 if v<1 else 2) for k,v in res.items()}
    for k,v in res.items(): print(f'{v:10.4g}  {k}')
    print(json.dumps(dict(benchmark='judging', videos=a.videos, resamples=n, rounds=a.rounds, **res, within=res['all metrics, s']<MOST)))

if __name__=='__main__': main()
