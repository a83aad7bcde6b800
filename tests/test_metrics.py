"Metrics and their intervals: 1,000 random cases against scikit-learn or the definition, cases worked out on paper, DeLong against the table of all pairs, comparisons that find what is there and nothing else"
import json
from pathlib import Path
import numpy as np,pytest
from scipy.stats import kstest
from sklearn.metrics import average_precision_score,roc_auc_score
from common import count,told
from deepfake_nb import metrics as M
from deepfake_nb.intervals import auc_interval,binormal,compare_auc,components,delong,few_errors,logit_interval,pairs,people,simulate,summary

SEED = 20318

def case(rng):
    "Scores and labels: up to 80 rows, few or many ties, balanced or as lopsided as one in all"
    n = int(rng.choice([2,3,5,10,30,80])); fakes = int(rng.choice([1, n-1, n//2, rng.integers(1, n)])) or 1
    y = rng.permutation(np.arange(n)<fakes).astype(int); s = rng.random(n)*rng.choice([.3,1])+rng.choice([0,.5,-.5])*y
    return np.round(s, int(rng.choice([0,1,2,15]))),y

def cases(n):
    rng = np.random.default_rng(SEED)
    return [case(rng) for _ in range(n)]

# ---- the definitions, slowly

def slow_auc(s, y):
    f,r = s[y==1][:,None],s[y==0]
    return ((f>r)+.5*(f==r)).mean()

def corners(s, y):
    "FPR and TPR at every threshold, one after the other"
    at = [np.inf, *sorted(set(s), reverse=True)]
    return np.array([(s[y==c]>=np.array(at)[:,None]).mean(1) for c in (0,1)])

def slow_ap(s, y):
    "Sum over the thresholds of (gain in recall) x precision"
    t,last,res = sorted(set(s), reverse=True),0,0
    for x in t: recall = (s[y==1]>=x).mean(); res += (recall-last)*y[s>=x].mean(); last = recall
    return res

def slow_eer(s, y):
    "Walk along the straight pieces of the curve to where FPR = 1-TPR, by halving"
    f,t = corners(s, y); lo,hi,k = 0.,len(f)-1.,np.arange(len(f))
    at = lambda x: [np.interp(x, k, v) for v in (f, t)]
    for _ in range(44): mid = (lo+hi)/2; lo,hi = (mid,hi) if sum(at(mid))<1 else (lo,mid)
    return at(hi)[0]

def slow_tpr(s, y, fpr):
    f,t = corners(s, y)
    return max(b for a,b in zip(f, t) if a<=max(fpr, 1/(y==0).sum())+1e-9)

def test_metrics_are_what_others_compute():
    n,good = count(1000),0
    for s,y in cases(n):
        pairs_ = [(M.auc(s, y), roc_auc_score(y, s)), (M.auc(s, y), slow_auc(s, y)), (M.average_precision(s, y), average_precision_score(y, s)),
                  (M.average_precision(s, y), slow_ap(s, y)), (M.eer(s, y), slow_eer(s, y)), *((M.tpr_at_fpr(s, y, f).value, slow_tpr(s, y, f)) for f in (.01,.05,.3))]
        good += all(abs(a-b)<1e-9 for a,b in pairs_)
    told(good, n, 'random cases: AUC and AP are scikit-learn\'s and the definition\'s, EER and TPR the definition\'s', SEED)

def test_the_fast_forms_are_the_slow_ones():
    n,good = count(100),0
    for i,(s,y) in enumerate(cases(n)):
        w = np.random.default_rng(i).integers(0, 3, (3, len(y))); w[:,[np.argmax(y==0),np.argmax(y==1)]] += 1 # zero weights too, but never a class without any
        got = {k:f(*M.rocs(s, y, w.astype(float))) for k,f in M._FAST.items()}
        good += all(abs(got[k][j]-M.METRICS[k](np.repeat(s, r), np.repeat(y, r)))<1e-9 for j,r in enumerate(w) for k in M.METRICS)
    told(good, n, 'random cases under three sets of weights: every metric is that of the repeated rows', SEED)

# ---- on paper

# reals .1 .4 .6, fakes .35 .7 .8
# pairs in order: .35 above .1 only (1), .7 above all (3), .8 above all (3): 7 of 9
# from the top: .8 F, .7 F, .6 R, .4 R, .35 F, .1 R -> (FPR,TPR) 0,1/3  0,2/3  1/3,2/3  ... : at 1/3,2/3 FPR = 1-TPR, so EER 1/3
# AP: 1/3*1 + 1/3*1 + 1/3*(3/5) = 13/15
SIX = np.array([.1,.4,.6,.35,.7,.8]),np.array([0,0,0,1,1,1])

def test_by_hand():
    assert M.auc(*SIX)==pytest.approx(7/9) and M.average_precision(*SIX)==pytest.approx(13/15) and M.eer(*SIX)==pytest.approx(1/3)
    # three reals: the smallest step is 1/3, and with one real accused (.6) the fakes .7 and .8 are caught
    c = M.tpr_at_fpr(*SIX, .01); assert (c.value, c.at, c.exact)==(pytest.approx(2/3), pytest.approx(1/3), False)
    # three tied scores .5 (R, F, F) and a real at .2: pairs .5 .5 1 1 -> 3/4; AP: all at once 2/3; the curve goes 0,0 -> 1/2,1 -> 1,1: FPR = 1-TPR at 1/3
    tied = [.5,.5,.5,.2],[0,1,1,0]; assert (M.auc(*tied), M.average_precision(*tied), M.eer(*tied))==pytest.approx((3/4, 2/3, 1/3))
    # one real on top of nine fakes: no pair in order; AP: precisions 1/2, 2/3 ... 9/10, each for a ninth of the recall
    upside = np.arange(10.),np.r_[np.ones(9, int), 0]; assert M.auc(*upside)==0 and M.eer(*upside)==1
    assert M.average_precision(*upside)==pytest.approx(sum(i/(i+1) for i in range(1,10))/9)
    # 200 reals at 0..199, fakes at 197.5 (two reals above) and 198.5 (one): 1 % is two reals, so both are caught; 1/200 catches the second only
    long = np.r_[np.arange(200.), 197.5, 198.5],np.r_[np.zeros(200, int), 1, 1]
    assert M.tpr_at_fpr(*long, .01).value==1 and M.tpr_at_fpr(*long, .005).value==.5 and M.tpr_at_fpr(*long, .01).exact

def test_delong_by_hand():
    # shares: fakes 1/3, 1, 1 (variance 4/27), reals 1, 2/3, 2/3 (variance 1/27); (4/27+1/27)/3 = 5/81
    assert components(*SIX)==pytest.approx([1, 2/3, 2/3, 1/3, 1, 1])
    assert delong(*SIX)==(pytest.approx(7/9), pytest.approx(5/81))
    # units a: .1 .35, b: .4 .7, c: .6 .8. Deviations over 3: reals (2/9, -1/9, -1/9)/3, fakes (-4/9, 2/9, 2/9)/3; sums a -2/27, b 1/27, c 1/27; times 3/2: 3/2*6/729 = 1/81
    assert delong(*SIX, list('abcabc'))[1]==pytest.approx(1/81)

def test_coverage_and_video_keys_by_hand():
    keys = [f'd/m/c23/{i}' for i in range(4)]; c = M.coverage(keys, [dict(key=f'{keys[0]}#0'), dict(key=f'{keys[0]}#1'), dict(key=f'{keys[2]}#0')])
    assert c==dict(expected=4, scored=2, share=.5, missing=[keys[1],keys[3]])
    a = M.aggregate([dict(key=f'{keys[0]}#0', label=1, score=.2), dict(key=f'{keys[0]}#1', label=1, score=.6), dict(key=keys[1], label=0, score=.1)])
    assert a.score.tolist()==pytest.approx([.4,.1]) and a.clips.tolist()==[2,1]

# ---- the resamples

def test_blocks_change_no_bit(monkeypatch):
    for i,(N,U) in enumerate(((40,40), (700,700), (900,30))):
        r = np.random.default_rng(i); y = r.permutation(np.arange(N)%2); s = np.round(r.normal(size=N)+y, 1); u = r.integers(0, U, N) if U<N else np.arange(N)
        got = []
        for b in (1, 1000, 2**15, 2**40): monkeypatch.setattr(M, 'BLOCK', b); got.append(M.bootstraps(M.METRICS, s, y, u, 100, 3))
        assert all((got[0][k]==g[k]).all() for g in got for k in M.METRICS) and len(got[0]['auc'])==100

def test_a_resample_is_the_metric_of_the_rows_it_drew():
    s,y,u = people(np.random.default_rng(0), 12, .8); n,kind = M.strata(y, u)
    w = M.draws(kind, 20, np.random.default_rng(9)).astype(int); v = M.bootstraps(['auc','eer'], s, y, u, 20, 9)
    for j in range(20):
        rows = np.concatenate([np.flatnonzero(n==i) for i in np.repeat(np.arange(12), w[j])])
        assert v['auc'][j]==pytest.approx(roc_auc_score(y[rows], s[rows])) and v['eer'][j]==pytest.approx(M.eer(s[rows], y[rows]))

# ---- DeLong

def slow_delong(s, y, u):
    "The table of all pairs, and Obuchowski's formula as it is printed, unit by unit"
    win = (s[y==1][:,None]>s[y==0])+.5*(s[y==1][:,None]==s[y==0]); A,(m,n) = win.mean(),win.shape
    v10,v01 = win.mean(1)-A,win.mean(0)-A; uf,ur,units = u[y==1],u[y==0],np.unique(u)
    x,z = (np.array([v[w==i].sum() for i in units]) for v,w in ((v10,uf), (v01,ur)))
    i10,i01,i = len(np.unique(uf)),len(np.unique(ur)),len(units)
    return A,(x**2).sum()*i10/((i10-1)*m*m)+(z**2).sum()*i01/((i01-1)*n*n)+2*(x*z).sum()*i/((i-1)*m*n)

def test_delong_is_the_table_of_all_pairs():
    n,rng,good = count(300),np.random.default_rng(SEED),0
    while good<n:
        s,y = case(rng); u = rng.integers(0, max(4, len(y)//int(rng.integers(1,4))), len(y))
        if len(set(u[y==0]))<2 or len(set(u[y==1]))<2: # then there is no variance, and it says so
            with pytest.raises(M.MetricError, match='1 unit|0 unit'): delong(s, y, u)
            continue
        assert delong(s, y, u)==pytest.approx(slow_delong(s, y, u), abs=1e-12); good += 1
        own = np.arange(len(y)); assert delong(s, y, own)==delong(s, y)==pytest.approx(slow_delong(s, y, own), abs=1e-12)
    told(good, n, 'random cases over units: AUC and variance by midranks are those of the table of all pairs', SEED)

@pytest.mark.parametrize('world,n', [(binormal,300), (people,60)])
def test_delong_is_what_new_samples_show(world, n):
    "The mean of the variances, the variance of 1,500 AUCs from new samples, and that of the bootstrap"
    got = np.array([delong(*world(np.random.default_rng([SEED,i]), n, .85)) for i in range(1500)])
    assert got[:,1].mean()==pytest.approx(got[:,0].var(), rel=.12)
    d = world(np.random.default_rng(4), n, .85); assert M.bootstraps(['auc'], *d, 2000)['auc'].var()==pytest.approx(delong(*d)[1], rel=.12)

def test_no_error_and_no_variance():
    y = np.repeat([0,1], [30,20]); s = np.r_[np.arange(30), 100+np.arange(20)]
    i = auc_interval(s, y); assert (i.value, i.hi, i.method)==(1, 1, 'exact over units') and i.lo==pytest.approx(.025**(1/20)) and '20 disjoint pairs' in i.note
    assert auc_interval(s, y, level=.9).lo==pytest.approx(.05**(1/20)) and auc_interval(-s, y)[:3]==pytest.approx((0, 0, 1-.025**(1/20)))
    # ten people with reals and fakes: five disjoint pairs
    assert auc_interval(s, y, np.arange(50)%10).lo==pytest.approx(.025**(1/5))
    flat = auc_interval(np.zeros(50), y); assert flat.lo<.35 and flat.hi>.65 and 'no variance' in flat.note
    # pairs of which each fake is just above its own real: the sums of the units cancel, and the bound steps in
    stairs = logit_interval(np.r_[np.arange(20.), np.arange(20)+.5], np.repeat([0,1], 20), np.tile(np.arange(20), 2)); assert 'no variance' in stairs.note and stairs.hi-stairs.lo>.3

def test_the_exact_bound_is_no_promise_broken():
    "Of 4,000 sets of 8 and 8 with AUC at the bound for 8 pairs, at most 2.5 % show no error"
    sets = (binormal(np.random.default_rng([SEED,i]), 16, .025**(1/8)) for i in range(4000))
    n = sum(s[y==1].min()>s[y==0].max() for s,y,_ in sets)
    assert 0<n<=100, n

def test_the_rule_chooses_by_errors():
    for n,a,way in ((50,.75,'bootstrap'), (50,.97,'logit'), (1000,.9,'bootstrap'), (1000,.997,'logit')):
        s,y,u = binormal(np.random.default_rng(1), n, a); i = auc_interval(s, y, u)
        assert few_errors(i.value, n//2)==(way=='logit') and i.method==f'{way} over units', (n, a, str(i))
        want = logit_interval(s, y)[1:3] if way=='logit' else M.bootstrap('auc', s, y, u); assert i[1:3]==want and i.lo<i.value<i.hi
    s,y,u = people(np.random.default_rng(1), 50, .75); assert pairs(M.strata(y, u)[1])==25 and auc_interval(s, y, u).method=='logit over units' and auc_interval(s, y).method=='bootstrap over units'

def test_the_record_is_what_a_run_gives():
    "Two cells of the coverage simulation, drawn again, give the counts that are kept"
    kept = json.loads((Path(__file__).parents[1]/'records'/'coverage.json').read_text()); rows = {(r['world'],r['n'],r['area'],r['way']):r for r in kept['rows']}
    for world,n,a in ((binormal,50,.95), (people,20,.75)):
        new, = simulate(lambda s, y, u, _: dict(logit=logit_interval(s, y, u)[1:3]), world, n, a, kept['draws'], kept['seed'])
        old = rows[world.__name__,n,a,'logit']; assert all(new[k]==old[k] for k in ('held','below','above','draws'))
    short = [r for r in rows.values() if r['way']=='rule' and r['held']<.925*r['draws']]; assert not short, short

# ---- two models

def two(rng, n, better, same=.6, rows=1):
    y = (np.arange(n)%2).repeat(rows); u = np.arange(n).repeat(rows); hard = rng.normal(size=n)[u]
    return *(same**.5*hard+(1-same)**.5*rng.normal(size=n*rows)+y*d for d in (1.2+better, 1.2)),y,u

@pytest.mark.parametrize('rows,n,draws', [(1,200,1000), (4,80,200)])
def test_equal_models_have_all_p_alike(rows, n, draws):
    p = [compare_auc(*two(np.random.default_rng([SEED,i]), n, 0, rows=rows), n=400).p for i in range(draws)]
    assert kstest(p, 'uniform').pvalue>.01 and np.mean(np.array(p)<.05)<.05+3*(.05*.95/draws)**.5

@pytest.mark.parametrize('rows,method', [(1,'DeLong over units'), (3,'paired bootstrap over units')])
def test_a_planted_difference_is_found(rows, method):
    got = [compare_auc(*two(np.random.default_rng([SEED,1,i]), 200, .5, rows=rows), n=300) for i in range(40)]
    truth = np.mean([g.difference for g in got]); assert {g.method for g in got}=={method} and truth>.05
    assert sum(g.p<.05 for g in got)>=36 and all((g.lo>0)==(g.p<.05) or .03<g.p<.07 for g in got) and sum(g.lo<=truth<=g.hi for g in got)>=34

def test_what_comparing_must_not_do():
    a,b,y,u = two(np.random.default_rng(2), 60, .3)
    d,back = compare_auc(a, b, y),compare_auc(b, a, y); assert d[:4]==pytest.approx((-back.difference, -back.hi, -back.lo, back.p))
    assert d.difference==pytest.approx(roc_auc_score(y, a)-roc_auc_score(y, b)) and compare_auc(a, np.exp(a), y)[:4]==(0, 0, 0, 1)
    # against a model that always says the same, the error of the difference is that of the other alone
    flat = compare_auc(a, np.zeros(60), y); assert (flat.hi-flat.lo)/(2*1.959964)==pytest.approx(delong(a, y)[1]**.5, rel=1e-5)
    # every row is written twice, so that units repeat: the paired bootstrap gives about what DeLong gave
    r = compare_auc(*(np.repeat(v, 2) for v in (a, b, y, u))); assert r.method.startswith('paired') and (r.lo, r.hi)==pytest.approx((d.lo, d.hi), abs=.03)
    for bad in ((a[:9], b, y), (a, b[:9], y), (a, b, np.ones(60))):
        with pytest.raises(M.MetricError): compare_auc(*bad)

# ---- the summary

def test_withheld_where_nothing_can_be_said():
    rng = np.random.default_rng(3)
    for reals,one,five in ((19,0,0), (20,0,1), (99,0,1), (100,1,1)):
        y = np.r_[np.zeros(reals, int), np.ones(150, int)]; out = summary(rng.normal(size=len(y))+y, y, n=50)
        for k,given in (('tpr@1%',one), ('tpr@5%',five)):
            assert (out[k]['value'] is not None)==given==bool(out[k]['method'])==(out[k]['lo'] is not None) and ('withheld' in out[k]['note'])!=given, (reals, k, out[k])
    assert list(out)==list(M.METRICS) and all(set(v)-{'at'}=={'value','lo','hi','method','note'} for v in out.values())
    s,y,u = binormal(rng, 400, .8); out = summary(s, y, u, n=200, seed=5); old = M.bootstraps(M.METRICS, s, y, u, 200, 5)
    for k in M.METRICS: assert out[k]['value']==M.METRICS[k](s, y) and (out[k]['lo'], out[k]['hi'])==pytest.approx(tuple(np.quantile(old[k], [.025,.975])))
    one = summary(s, y, np.zeros(400, int)); assert all(v['lo'] is None and '1 unit with reals' in v['note'] and v['method']=='' for v in one.values())
