"Calibration, threshold and selective risk: hand-worked numbers, scikit-learn, brute force, and the promises of the intervals"
import json
from dataclasses import asdict
import numpy as np,pandas as pd,pytest
from scipy.special import expit,logit
from scipy.stats import binom
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss,log_loss
from common import count,told
from deepfake_nb.bias import bias_table,choose_threshold
from deepfake_nb.calibration import (CLIP,CalibrationError,Frozen,aurc,brier,calibration_summary,carried,ece,fit_temperature,freeze,nll,perfect_ece,reliability,
    reprior,risk_coverage,warm)
from deepfake_nb.metrics import MetricError,auc

close = lambda a,b,eps=1e-9: np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=0, atol=eps)

def honest(n, rng, spread=1.5):
    "Scores that mean what they say, and labels of both classes"
    while True:
        p = expit(rng.normal(0, spread, n)); y = (rng.random(n)<p).astype(int)
        if 0<y.sum()<n: return p,y

def case(seed):
    "Scores and labels of a random size, shape and grain (ties)"
    rng = np.random.default_rng(seed); n = int(rng.integers(5, 150)); y = rng.permutation(np.r_[0,1,rng.integers(0, 2, n-2)])
    s = expit(rng.normal(rng.uniform(-1, 3)*y+rng.uniform(-2, 2), rng.uniform(.2, 3)))
    return np.clip(np.round(s, int(rng.choice([1,2,12]))), .001, .999),y,rng

def test_by_hand():
    # .9 said of a fake, .6 of a real: (.1^2 + .6^2)/2 = (.01+.36)/2 = .185; -(ln .9 + ln .4)/2 = (.105361+.916291)/2 = .510826
    close([brier([.9,.6], [1,0]), nll([.9,.6], [1,0])], [.185,.510826], 1e-6)
    # 0 said of a fake costs -ln 1e-7 = 16.118096, and 1 of a fake nothing; the real at 0 nothing
    close(nll([0,1,0], [1,1,0]), 16.118096/3, 1e-6)
    # two bins of equal width: {.1,.3} with 1 fake of 2: |.5-.2| = .3; {.6,.9,.9} with 2 of 3: |.6667-.8| = .1333; (2*.3+3*.13333)/5 = .2
    s,y = [.1,.3,.6,.9,.9],[0,1,0,1,1]
    close(ece(s, y, 2), .2); t = reliability(s, y, 2); close(t[['n','score','fakes']], [[2,.2,.5],[3,.8,2/3]])
    # two bins of equal mass: the median is .6 and belongs to the bin below: {.1,.3,.6}: |1/3-1/3| = 0; {.9,.9}: |1-.9| = .1; 2*.1/5 = .04
    close(ece(s, y, 2, 'mass'), .04)
    # Wilson, 1 of 2: mid (.5+3.8415/4)/(1+3.8415/2) = .5, half 1.96/2.92073*sqrt(.125+3.8415/16) = .405467
    close(t.loc[0,['lo','hi']], [.094533,.905467], 1e-4)

def test_temperature_base_rate_and_risk_by_hand():
    # five say .8 (three are fakes), five say .2 (two are fakes): should be .6; T = ln 4/ln 1.5 = 1.386294/.405465 = 3.419022
    close(fit_temperature([.8]*5+[.2]*5, [1,1,1,0,0]+[0,0,0,1,1]), 3.419022, 1e-4)
    # logit .8 = ln 4, half of it is ln 2: 2/3
    close(warm([.8,.2,.5], 2), [2/3,1/3,.5])
    # odds 9 * (1/99)/(1/1) = 1/11 -> 1/12; odds 4 * (1/4)/(2/1) = 1/2 -> 1/3
    close([reprior(.9, .5, .01), reprior(.8, 2/3, .2)], [1/12,1/3])
    # confidences .95 .9 .6 .55, wrong: the first and the last; risks 1, 1/2, 1/3, 2/4; mean 7/12; oracle 0, 0, 1/3, 2/4, mean 5/24
    t = risk_coverage([.95,.1,.6,.55], [0,0,1,0])
    close(t.risk, [1,1/2,1/3,1/2]); close(t.oracle, [0,0,1/3,1/2]); close(aurc([.95,.1,.6,.55], [0,0,1,0]), 7/12)
    # two equally sure, one wrong, then a right one: risks 1/2, 1/2, 1/3
    close(risk_coverage([.9,.1,.6], [0,0,1]).risk, [1/2,1/2,1/3])

def test_frozen_by_hand():
    # twenty reals .01 ... .20, so 5 % is one: the threshold lies between .19 and the next score, the fake at .195
    d = pd.DataFrame(dict(score=np.r_[np.arange(1, 21)/100, .195, .5, .1, .9], label=[0]*20+[1]*4)); f = freeze(d, 'fpr 5%', 'v')
    close(f.threshold, .1925); assert (f.n_real, f.n_fake, f.fpr, f.tpr, f.unscored)==(20, 4, .05, .75, 0)
    assert Frozen(**json.loads(json.dumps(asdict(f))))==f and freeze(d, 'fpr 5 %')==Frozen(**asdict(f)|dict(rule='fpr 5 %', name=''))
    # on a target: 1 of 4 reals accused, 3 of 5 fakes caught, one fake without a score; balanced (3/4+3/5)/2 = .675
    c = carried(f, dict(score=[.1,.1,.1,.5,.2,.2,.2,.1,.1,np.nan], label=[0]*4+[1]*6))
    close([c[k]['value'] for k in ('balanced','fpr','tpr')], [.675,.25,.6]); assert [(c[k]['n'], c[k]['unscored']) for k in c]==[(9,1),(4,0),(5,1)]
    # Newcombe by hand from Wilson's ends: tpr .6 in (.230724,.882376), fpr .25 in (.045587,.699358): .35-sqrt(.369276^2+.449358^2) = -.231627, .35+sqrt(.282376^2+.204413^2) = .698599
    close([c['balanced']['lo'], c['balanced']['hi']], [(1-.231627)/2,(1+.698599)/2], 1e-5)

@pytest.mark.parametrize('how,theirs', [('width','uniform'),('mass','quantile')])
def test_as_scikit_learn(how, theirs):
    "Equal mass: where an edge falls on a score, scikit-learn's interpolation puts it an ulp above or below; those sizes are left to the next test"
    n,good,seed = count(300),0,0
    for _ in range(n):
        while True:
            s,y,rng = case(seed); bins = int(rng.integers(1, 13)); seed += 1
            if how=='width' or bins==1 or all(k*(len(s)-1)%bins for k in range(1, bins)): break
        t = reliability(s, y, bins, how); true,pred = calibration_curve(y, s, n_bins=bins, strategy=theirs)
        good += len(t)==len(true) and np.allclose(t.fakes, true, atol=1e-12) and np.allclose(t.score, pred, atol=1e-12) and abs(ece(s, y, bins, how)-(t.n*abs(true-pred)).sum()/len(s))<1e-12 \
            and abs(brier(s, y)-brier_score_loss(y, s))<1e-12 and abs(nll(s, y)-log_loss(y, s))<1e-12
    told(good, n, f'Brier, NLL and reliability ({how}) equal to scikit-learn', 0)

def test_bins_of_equal_mass_by_brute_force():
    n,good = count(200),0
    for seed in range(n):
        s,y,rng = case(seed); bins = int(rng.integers(2, 13)); o = np.sort(s); edges = [o[k*(len(s)-1)//bins] for k in range(1, bins)]; of = [sum(x>e for e in edges) for x in s]
        groups = pd.DataFrame(dict(b=of, s=s, y=y)).groupby('b'); t = reliability(s, y, bins, 'mass')
        good += t.n.tolist()==groups.size().tolist() and abs(ece(s, y, bins, 'mass')-sum(abs(g.y.sum()-g.s.sum()) for _,g in groups)/len(s))<1e-12 and (len(set(s))<len(s) or t.n.max()-t.n.min()<=2)
    told(good, n, 'bins of equal mass', 0)

def test_clipping_is_that_of_log_loss():
    s,y = np.array([0,1,.3,1,0.]),np.array([1,0,1,1,0])
    close(nll(s, y), log_loss(y, np.clip(s, CLIP, 1-CLIP)), 1e-6); close(nll(s, y, .01), log_loss(y, np.clip(s, .01, .99)), .02)

def test_a_known_temperature_is_found():
    "Twenty sets distorted by a known T: the error over its standard error (Fisher information) looks like a normal number"
    off = []
    for seed in range(20):
        rng = np.random.default_rng(seed); true = rng.choice([.4,1.,2.5,6.]); p,y = honest(800, rng); z = logit(p)*true
        T = fit_temperature(expit(z), y); q = expit(z/T); se = T**2/np.sqrt((q*(1-q)*z**2).sum()); off.append((T-true)/se) # var(1/T) = 1/sum(q(1-q)z^2), and dT = T^2 d(1/T)
    off = np.array(off); told(int((abs(off)<3.3).sum()), 20, 'temperatures within 3.3 standard errors', 0)
    assert (abs(off)<1).sum()>=8 and .5<np.sqrt((off**2).mean())<1.5 and abs(off.mean())<.8
    print('within one standard error:', (abs(off)<1).sum(), 'root mean square', np.sqrt((off**2).mean()).round(2))

def test_what_a_temperature_may_and_may_not():
    n,good = count(200),0
    for seed in range(n):
        s,y,rng = case(seed); T = float(np.exp(rng.uniform(-1.5, 2.5))); good += auc(s, y)==auc(warm(s, T), y) and aurc(s, y)==pytest.approx(aurc(warm(s, T), y), abs=1e-9) and auc(s, y)==auc(reprior(s, .5, rng.uniform(.01, .99)), y)
        try: best = fit_temperature(s, y)
        except CalibrationError as e: assert any(w in str(e) for w in ('nothing to stretch','perfectly separated','wrong way','hardly')); continue
        assert all(nll(warm(s, best), y)<=nll(warm(s, best*f), y)+1e-9 for f in (.8,.97,1.03,1.3))
    told(good, n, 'orders kept by warm and reprior', 0)

def test_no_temperature_has_a_name():
    for s,word in (([.7]*4,'nothing to stretch'), ([.2,.4,.6,.9],'perfectly separated'), ([.9,.8,.3,.1],'wrong way'), ([0,0,1,1],'perfectly separated'), ([.5,.2,.8,.9],'perfectly separated')):
        with pytest.raises(CalibrationError, match=word): fit_temperature(s, [0,0,1,1])
    with pytest.raises(MetricError, match='4 real and 0 fake'): fit_temperature([.1,.2,.3,.4], [0]*4)
    with pytest.raises(CalibrationError, match='not a logit'): fit_temperature([-3,2,1,4], [0,1,0,1])
    assert .1<fit_temperature([.6,.7,.8,.9,.3], [0,1,0,1,0])<10 # separated, but not at .5: there is a best one

def test_rules_by_brute_force():
    n,good = count(200),0
    for seed in range(n):
        s,y,rng = case(seed); d = dict(score=s, label=y); n0 = (y==0).sum(); share = int(rng.choice([5,10,25,40]))
        cuts = [(np.mean(s[y==0]>=c), np.mean(s[y==1]>=c)) for c in np.r_[0, np.unique(s), 1.1]]
        if n0*share<100:
            with pytest.raises(CalibrationError, match='less than one video'): freeze(d, f'fpr {share}%')
            good += 1; continue
        f = freeze(d, f'fpr {share}%'); c = carried(f, d)
        good += f.fpr<=share/100+1e-9 and f.tpr==max(t for a,t in cuts if a<=share/100+1e-9) and (c['fpr']['value'], c['tpr']['value'])==(f.fpr, f.tpr) and freeze(d).threshold==choose_threshold(s, y) \
            and all(c[k]['lo']-1e-12<=c[k]['value']<=c[k]['hi']+1e-12 for k in c)
        r = bias_table(d, f.threshold, ()).iloc[0]; close([r.real, r.fake, 1-r.real_hi, r.fake_lo], [1-f.fpr, f.tpr, c['fpr']['lo'], c['tpr']['lo']])
    told(good, n, 'frozen points as brute force finds them', 0)

def test_what_may_not_choose():
    d = pd.DataFrame(dict(score=[.1,.2,.8,.9], label=[0,0,1,1], video=list('abcd'), split='val')); assert freeze(d).n_real==2
    for bad,word in ((d.assign(split=['val']*3+['test']),'test'), (d.assign(split='train'),'train'), (d.assign(video='a'),'per_video'), (d.assign(score=d.score*9),'not a logit'),
                     (d.drop(columns='label'),'no column label'), (d.assign(label=[0,0,1,2]),'only 0'), (d.assign(score=[.1,.2,.3,np.inf]),'not a logit')):
        with pytest.raises(CalibrationError, match=word): freeze(bad)
    for bad in (d[d.label==0], d.assign(score=np.nan)):
        with pytest.raises(MetricError, match='0 fake'): freeze(bad)
    for rule in ('best','fpr 0%','fpr 100%','fpr','fpr 5% '):
        with pytest.raises(CalibrationError): freeze(d, rule)

def test_selective_risk_is_the_mean_over_orders_of_ties():
    for seed in range(count(30)):
        s,y,rng = case(seed); wrong = (s>=.5)!=(y==1); sure = np.maximum(s, 1-s).round(12); k = np.arange(1, len(s)+1); runs = []
        for _ in range(300): o = np.lexsort((rng.random(len(s)), -sure)); runs.append(wrong[o].cumsum()/k)
        t = risk_coverage(s, y); assert abs(t.risk-np.mean(runs, 0)).max()<.17 and abs(aurc(s, y)-np.mean(runs))<.03
        assert (t.oracle<=t.risk+1e-12).all() and t.risk.iloc[-1]==pytest.approx(wrong.mean()) and t.oracle.iloc[-1]==pytest.approx(wrong.mean())

def test_intervals_of_a_frozen_point_exactly():
    "Coverage of the balanced accuracy's interval, summed over all outcomes"
    f = Frozen(.5, 'balanced', '', 1, 1, 0., 1.); n0,n1 = 15,25; ends = np.empty((n0+1, n1+1, 2))
    for i in range(n0+1):
        for j in range(n1+1): b = carried(f, dict(score=np.r_[np.repeat([.9,.1], [i,n0-i]), np.repeat([.9,.1], [j,n1-j])], label=np.r_[np.zeros(n0, int), np.ones(n1, int)]))['balanced']; ends[i,j] = b['lo'],b['hi']
    got = {}
    for fpr,tpr in ((.05,.6),(.05,.95),(.3,.7),(.3,.9),(.5,.5)):
        true = (1+tpr-fpr)/2; weight = binom.pmf(np.arange(n0+1), n0, fpr)[:,None]*binom.pmf(np.arange(n1+1), n1, tpr); got[fpr,tpr] = float((weight*((ends[...,0]<=true)&(true<=ends[...,1]))).sum())
    print({k:round(v, 3) for k,v in got.items()}); assert min(got.values())>.9 and .935<np.mean([*got.values()])<.985

def test_intervals_of_the_summary_hold_the_truth():
    "Brier keeps 95 %; ECE's interval is a makeshift, and its share is what the chapter says"
    n,size,stretch = max(count(300), 300),200,2.
    rng = np.random.default_rng(99); p,y = honest(1_000_000, rng); big = expit(stretch*logit(p)); truth = dict(brier=np.mean([((big[y==c]-c)**2).mean() for c in (0,1)]), ece=ece(big, y)) # half reals, half fakes
    hit = dict(brier=0, ece=0)
    for seed in range(n):
        rng = np.random.default_rng(seed); p,y = honest(4*size, rng); i = np.r_[np.flatnonzero(y==0)[:size//2], np.flatnonzero(y==1)[:size//2]]; out = calibration_summary(expit(stretch*logit(p[i])), y[i], n=400, seed=seed)
        for k in hit: hit[k] += out[k]['lo']<=truth[k]<=out[k]['hi']
    share = {k:v/n for k,v in hit.items()}; print(share); assert .92<=share['brier']<=.98 and share['ece']>=.84

def test_units_and_seeds_of_the_summary():
    p,y = honest(120, np.random.default_rng(1)); clips = [np.repeat(x, 5) for x in (p, y, np.arange(120))]; a,b = calibration_summary(*clips[:2], clips[2]),calibration_summary(p, y)
    assert a==calibration_summary(*clips[:2], clips[2]) and a['brier']['lo']!=calibration_summary(*clips[:2], clips[2], seed=1)['brier']['lo']
    for k in ('brier','nll'): close([a[k]['lo'], a[k]['hi']], [b[k]['lo'], b[k]['hi']], .03)
    assert 'fitted on the source' in calibration_summary(p, y, fitted_on='the source')['brier']['note'] and json.loads(json.dumps(b))==b
    alone = calibration_summary(p, y, np.zeros(120)); assert alone['ece']['lo'] is None and 'an interval needs two' in alone['nll']['note']

def test_luck_of_a_perfect_score():
    "Five in a hundred perfectly calibrated sets are called uncalibrated"
    n = max(count(300), 300); got = [ece(*honest(150, np.random.default_rng(i)))>perfect_ece(honest(150, np.random.default_rng(i))[0], n=300, seed=i).high for i in range(n)]
    print('called uncalibrated:', np.mean(got)); assert .015<np.mean(got)<.1
    for how in ('width','mass'):
        s,_ = honest(100, np.random.default_rng(3)); rng = np.random.default_rng(4); by_hand = [ece(s, z, how=how) for z in (rng.random((500, 100))<s).astype(int)]
        close(perfect_ece(s, how=how), (np.mean(by_hand), np.quantile(by_hand, .95)), .01)
