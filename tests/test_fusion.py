"The fusion by hand: algebra of silence, files a stranger wrote, what is refused, promises kept over seeds; and the whole stage at toy size"
import json,math
from dataclasses import replace
from types import SimpleNamespace
import numpy as np,pandas as pd,pytest,torch
from common import count,play,told
from deepfake_nb.bias import wilson
from deepfake_nb.checkpoints import save_weights
from deepfake_nb.compare import load_result
from deepfake_nb.datasets import read_dataset
from deepfake_nb.executors import notebook
from deepfake_nb.fusion import KINDS,UNSURE,Fusion,FusionError,against,choose_kind,fit_fusion,leave_one_out,load_fusion,member_table,out_of_fold,promises,verdicts
from deepfake_nb.leakage import LeakError
from deepfake_nb.metrics import auc
from deepfake_nb.miniatures import miniature
from deepfake_nb.pack import read_json,sha256
from deepfake_nb.runs import declared,run_stage
from deepfake_nb.specialists.stages import specialist_settings,stage_of,start_model
from deepfake_nb.stf_mamba import STFConfig,build_stf_mamba
from deepfake_nb.stores import build_store

sig = lambda z: 1/(1+np.exp(-z))
NAMES = list('ABCDE')

def team(n, seed, rho=.3, d=(1.4,1.,1.,.8,.5), silent=.3, people=100):
    "Members that are calibrated by themselves, err together by `rho`, and are silent at random"
    r = np.random.default_rng(seed); y = np.arange(n)%2
    x = np.outer(2*y-1, np.array(d)/2)+np.sqrt(rho)*r.normal(size=(n,1))+np.sqrt(1-rho)*r.normal(size=(n,len(d)))
    p = sig(x*np.array(d)); p[r.random(p.shape)<silent] = np.nan
    return pd.DataFrame(dict(video=[f'sim/{("real","made")[a]}/c23/{i}' for i,a in enumerate(y)], label=y, group=[f'p{i//2%people}' for i in range(n)])).assign(**dict(zip(NAMES, p.T)))

def rows(**cols): n = len(next(iter(cols.values()))); return pd.DataFrame(dict(video=[f'v{i}' for i in range(n)], label=[i%2 for i in range(n)], group=[f'g{i}' for i in range(n)])|cols)

def any_fusion(r):
    "A sound fusion of any kind, drawn"
    kind,ns = KINDS[r.integers(3)],[f'm{i}' for i in range(r.integers(1, 8))]; w = r.dirichlet(np.ones(len(ns)))+1e-4; w = w/w.sum() if kind!='stacked' else r.normal(size=len(ns))
    units = {n:[float(r.normal()), float(r.uniform(.2, 5))] for n in ns} if kind=='weighted' else {}; present = {n:float(r.normal()) for n in ns} if kind=='stacked' else {}
    return Fusion(kind, dict(zip(ns, w.tolist())), units, present, float(r.uniform()), float(r.normal()), float(r.uniform(.2, 5)), float(r.uniform(.05, .95)), ('gone',)*int(r.integers(2)), 'drawn', dict(sha256='x'))

def test_by_hand():
    f = Fusion('mean', dict(A=.5, B=.5), together=.5); p = f(rows(A=[.8,.8,np.nan,1.], B=[.4,np.nan,np.nan,np.nan]))
    z = (math.log(4)+math.log(2/3))/2
    assert np.allclose(p[:2], [sig(z/(.5+.5/2)), .8]) and np.isnan(p[2]) and np.isclose(p[3], sig(7)) # two are worth 4/3; one that is sure is not believed beyond the bound
    s = Fusion('stacked', dict(A=2., B=-1.), present=dict(A=.5, B=0.), shift=.25, temperature=2., prior=.25, together=1.)
    assert np.isclose(s(rows(A=[.8], B=[.4]))[0], sig(math.log(1/3)+((2*math.log(4)-math.log(2/3))/2+.5-.25)/2)) # each of two that only repeat each other counts half
    assert np.isclose(s(rows(A=[.8], B=[np.nan]))[0], sig(math.log(1/3)+(2*math.log(4)+.5-.25)/2))

def test_silence_is_as_if_they_did_not_exist():
    n = count(200); good = 0
    for i in range(n):
        r = np.random.default_rng(i); f = any_fusion(r); ns = list(f.weights); x = r.uniform(size=(6,len(ns))); x[r.random(x.shape)<.4] = np.nan
        t = rows(**dict(zip(ns, x.T))); p = f(t); ok = p.isna().equals(t[ns].isna().all(axis=1))
        for j in range(6):
            on = [m for m in ns if not np.isnan(t[m][j])]
            if not on: continue
            total = sum(f.weights[m] for m in on) if f.kind!='stacked' else 1
            g = replace(f, weights={m:f.weights[m]/total for m in on}, units={m:f.units[m] for m in on if m in f.units}, present={m:f.present[m] for m in on if m in f.present})
            ok &= bool(np.isclose(g(t.iloc[[j]]).iloc[0], p[j]))
        ok &= p.equals(f(t[::-1]).sort_index()) # a row alone is what it is among others
        good += ok
    told(good, n, 'fusions where who is silent might as well not exist', 0)

def test_round_trip():
    n = count(200); told(sum(Fusion.from_json((f := any_fusion(np.random.default_rng(i))).to_json())==f for i in range(n)), n, 'round trips', 0)

HOSTILE = [dict(kind='vote'), dict(kind=['mean']), dict(weights={}), dict(weights=[]), dict(weights=dict(A=.5)), dict(weights=dict(A=-.5, B=1.5)), dict(weights=dict(A='1', B=0)), dict(weights=dict(A=True, B=0)), dict(weights=dict(label=.5, A=.5)),
           dict(weights={'':1.}), dict(units=dict(A=[0,1])), dict(units=[1]), dict(present=dict(A=1)), dict(together=2), dict(together=None), dict(temperature=0), dict(temperature=-1), dict(temperature=10**400), dict(shift=[0]), dict(prior=1),
           dict(prior=0), dict(unused='AB'), dict(unused=['A']), dict(unused=[1]), dict(fitted_on=3), dict(about=[]), dict(format='deepfake_nb fusion 9'), dict(format=None), dict(more=1)]

@pytest.mark.parametrize('change', HOSTILE, ids=str)
def test_a_hostile_file_is_refused(tmp_path, change):
    good = json.loads(Fusion('mean', dict(A=.5, B=.5)).to_json()); p = tmp_path/'fusion.json'
    p.write_text(json.dumps(good|change))
    with pytest.raises(FusionError, match=str(p)): load_fusion(p)

@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '3', '{"format": "deepfake_nb fusion 1"}', '['*100_000, '{"a":'*100_000, ' '*2**21, '\udcff', 'NaN'], ids=lambda t: t[:20]+str(len(t)))
def test_what_is_no_fusion_at_all(tmp_path, text):
    p = tmp_path/'fusion.json'; p.write_bytes(text.encode('utf-8', 'surrogateescape'))
    with pytest.raises(FusionError, match='fusion.json'): load_fusion(p)
    with pytest.raises(FusionError): load_fusion(tmp_path/'none.json')

def test_not_a_number_is_no_number(tmp_path):
    for word in ('NaN','Infinity','-Infinity'):
        p = tmp_path/'f.json'; p.write_text(Fusion('mean', dict(A=1.)).to_json().replace('"shift": 0.0', f'"shift": {word}')); assert word in p.read_text()
        with pytest.raises(FusionError): load_fusion(p)

def test_tables_that_do_not_belong_together():
    a = rows(score=[.1,.9,.2]); m = member_table(dict(A=a, B=a.iloc[1:].assign(score=np.nan)), [SimpleNamespace(key=k, label=int(k in ('v1','v9')), group='g9' if k=='v9' else f'g{k[1]}', split='val') for k in ('v0','v1','v2','v9')])
    assert m.video.tolist()==['v0','v1','v2','v9'] and m.A.isna().tolist()==[False]*3+[True] and m.B.isna().all() and set(m.split)=={'val'}
    for bad,words in ((a.assign(label=1), 'label'), (a.assign(group='x'), 'group'), (a.assign(score=1.5), 'probability'), (a.assign(score=np.inf), 'probability'), (pd.concat([a, a]), 'twice')):
        with pytest.raises(FusionError, match=words): member_table(dict(A=a, B=bad))
    with pytest.raises(FusionError, match='not to be judged'): member_table(dict(A=a), [SimpleNamespace(key='v0', label=0, group='g0', split='')])

def test_refusals():
    t = team(200, 0)
    for bad,exc,words in ((t.assign(group=''), FusionError, 'no group'), (t.assign(group=None), FusionError, 'no group'), (t.assign(split='test'), LeakError, 'test part'), (t.assign(label=1), FusionError, '0 groups with reals'),
                          (t[t.group.isin(['p1','p2','p3','p4'])], FusionError, '4 groups with reals'), (t.assign(**dict.fromkeys(NAMES, np.nan)), FusionError, '0 groups')):
        with pytest.raises(exc, match=words): fit_fusion(bad)
    with pytest.raises(LeakError, match=r'p1, p2 \(2 of 100 groups\)'): fit_fusion(t, train_groups=['p2','p1','zoe'])
    for kind in KINDS:
        f = fit_fusion(t.assign(AV=np.nan), kind); assert 'AV' in f.unused and 'AV answered no video' in f.fitted_on
        only = t.head(1).assign(**dict.fromkeys(NAMES, np.nan), AV=.99); v = verdicts(f, only); assert v.answer[0]==UNSURE and np.isnan(v.confidence[0]) and v.reason[0].startswith('0 of')

def test_nobody_is_judged_by_a_fusion_that_saw_him():
    "Out of fold: the labels of a group change nothing of what is said about it, up to the common temperature"
    t = team(300, 3, people=30); a = out_of_fold(t, 'stacked'); other = t.copy(); mine = other.group=='p7'; other.loc[mine,'label'] = 1-other.label[mine]
    b = out_of_fold(other, 'stacked'); x,y = (np.log(o.score[mine]/(1-o.score[mine])) for o in (a, b)); ok = x.notna()
    assert np.corrcoef(x[ok], y[ok])[0,1]>.999

@pytest.mark.parametrize('kind', KINDS)
def test_the_confidence_is_its_frequency(kind):
    "2,000 verdicts of 20 fusions: in each bin of confidence, and for each number of members present, as many are right as was said"
    n = count(20); v = pd.concat([verdicts(fit_fusion(team(600, s), kind), team(2000//20, 1000+s)) for s in range(n)], ignore_index=True)
    t = promises(v); print(t.round(3)); assert t.n.sum()==v.confidence.notna().sum()>1900*n/20 and t.kept.sum()>=len(t)-1
    right = ((v.score>=.5)==(v.label==1))[v.score.notna()]
    for k,g in v[v.score.notna()].groupby('members'): lo,hi = wilson(right[g.index].sum(), len(g), 3.29); assert lo<=g.confidence.mean()<=hi, (kind, k, len(g), g.confidence.mean(), right[g.index].mean())
    sure = v[v.answer!=UNSURE]; lo,hi = wilson(right[sure.index].sum(), len(sure)); assert lo<=sure.confidence.mean()<=hi and (sure.confidence>=.8).all()

def test_a_liar_and_a_shouter():
    v,t = team(600, 1, silent=0, d=(1.,)*5),team(4000, 2, silent=0, d=(1.,)*5); lie = lambda x: x.assign(E=1-x.E); a = {k:auc(fit_fusion(lie(v), k)(lie(t)), t.label) for k in KINDS}
    assert a['stacked']>a['weighted']-.002>a['mean'] and fit_fusion(lie(v), 'stacked').weights['E']<0 and fit_fusion(lie(v), 'weighted').unused==('E',)
    assert abs(a['stacked']-auc(fit_fusion(v, 'stacked')(t), t.label))<.005

def test_a_table_in_which_nobody_knows_anything_says_so():
    t = team(400, 4, d=(0.,)*5); r = np.random.default_rng(0); t[NAMES] = np.where(t[NAMES].isna(), np.nan, r.uniform(size=t[NAMES].shape))
    for k in KINDS: p = fit_fusion(t, k)(t.assign(**{n:r.uniform(size=len(t)) for n in NAMES})); assert abs(p-.5).mean()<.1
    assert len(choose_kind(t))==3

def test_against_and_without():
    v,t = team(600, 5),team(600, 6); f = fit_fusion(v, 'weighted'); d = against(t.assign(**{'B4 x 6':t.A}), f, ['B4 x 6'], n=100)
    assert d.index.tolist()==['weighted','plain mean',*f.weights,*f.unused,'B4 x 6'] and np.isclose(d.loc['A','auc'], auc(t.A[t.A.notna()], t.label[t.A.notna()])) and np.isclose(d.loc['A','ours_minus'], d.loc['B4 x 6','ours_minus'])
    both = t.A.notna(); assert np.isclose(d.loc['A','ours_minus'], auc(f(t)[both], t.label[both])-auc(t.A[both], t.label[both])) and d.loc['A','answered']==both.mean()
    g = leave_one_out(v, t, n=100); assert g.ours_minus.astype(float).idxmax()=='A'

# the stage
@pytest.fixture(scope='module')
def room(tmp_path_factory):
    "A miniature FaceForensics++ with native pixels, three specialists and a video model that nobody has trained, and one that was trained on somebody"
    d = tmp_path_factory.mktemp('fusion'); m = read_dataset(miniature('faceforensics', d/'mini')); m = m.where(compression=['c23'], method=['real','Deepfakes','FaceSwap'])
    build_store(m, d/'store', native=True); m.save(d/'store'/'manifest.jsonl'); tiny = specialist_settings('tiny')
    def keep(code, where, trained_on): torch.manual_seed(0); save_weights(d/where/'stage_1', 'stage_1', start_model(code, stage_of(1), tiny)[0], extra=dict(stage=1, trained_on=trained_on, selection='never trained'))
    for code in ('BG','CM','AV'): keep(code, f'models/{code}-abc', [])
    keep('LL', 'taught/LL', [dict(stage=1, sets=['FaceForensics++'], groups=3)]); keep('LL', 'named/LL', [dict(stage=1, sets=['FaceForensics++'], people=['FaceForensics++:033'])])
    torch.manual_seed(0); save_weights(d/'models'/'STF', 'phase_a_best', build_stf_mamba(STFConfig.phase_a('tiny'), weights='random'), extra=dict(length=4, selection='never trained', trained_on=[]))
    return d

def test_a_fusion_of_noise_is_not_better_than_anybody_out_of_fold():
    "Fitted on these very rows it would be: forty films, six members of pure noise"
    worse = 0
    for seed in range(n := count(8)):
        r = np.random.default_rng(seed); t = team(40, seed); t[NAMES] = r.random((40, len(NAMES))); given = dict(seed=seed, least=2)
        held = t.video.map(out_of_fold(t, 'stacked', **given).set_index('video').score); d = against(t, {'stacked, out of fold':fit_fusion(t, 'stacked', **given)}, scores={'stacked, out of fold':held}, n=200)
        worse += (d.loc[NAMES,'p']<.01).any() and d.loc['stacked, out of fold','auc']>.6
    told(n-worse, n, 'fusions of noise that look like noise', 0) if not worse else None; assert worse<=n//8

def test_a_member_of_one_class_and_a_verdict_without_a_number():
    t = team(200, 1); f = fit_fusion(t, 'mean'); one = t.assign(A=t.A.where(t.label==1)); d = against(one, f, n=50)
    assert np.isnan(d.auc['A']) and d.note['A'] and d.auc['B']>.5
    v = verdicts(f, t[:4], score=[np.nan,.9,.1,np.nan]); assert v.answer.tolist()==[UNSURE,'fake','real',UNSURE]

def test_integrate_from_models_to_a_verdict(room, tmp_path):
    given = dict(preset='tiny', members=str(room/'models'), store=str(room/'store'), split='train,val', test_store=str(room/'store'), people=2, out=str(tmp_path/'out'))
    assert all(p['help'] for p in declared(notebook('integrate')).values())
    rec = run_stage(notebook('integrate'), given, runs=tmp_path/'runs').check(); w = rec.metrics['integrate']; f = load_fusion(tmp_path/'out'/'fusion.json'); card = read_json(tmp_path/'out'/'fusion_card.json')
    r = load_result(tmp_path/'out'/'result.json'); t, = r['targets']; assert r.name==f"fusion, {w['kind']}" and np.isclose(t['metrics']['video']['auc']['value'], w['auc']) and t['coverage']['expected']==7 and r['detector']['sha256']==w['model_sha256'] and t['relation']=='in-domain' # it was fitted on that set
    assert w['videos']==7 and 0<=w['auc']<=1 and w['kind'] in KINDS and w['kind']==next(iter(w['out_of_fold'])) and w['model_sha256']==sha256(tmp_path/'out'/'fusion.json')==card['fusion']
    assert set(f.members)=={'AV','BG','CM','STF'} and 'AV' in f.unused and 'AV answered no video' in f.fitted_on and any('60 frames' in n for n in w['notes'])
    for n,m in f.about['members'].items(): assert len(m['sha256'])==64 and (room/'models') in (p := tmp_path/m['folder']).parents and p.is_dir()
    assert {'weighted','mean','stacked','plain mean','BG','CM','STF'} <= {r['name'] for r in w['table']}

def test_integrate_without_a_test_judges_out_of_fold(room, tmp_path):
    pd.DataFrame(dict(video=['FaceForensics++/real/c23/672'], other=[.5])).to_csv(tmp_path/'other.csv', index=False)
    s = play('integrate', dict(preset='tiny', members=str(room/'models'), store=str(room/'store'), split='train,val', people=2, kind='stacked', out=str(tmp_path/'two'), extra=str(tmp_path/'other.csv'), damages='H.264,blur', shaken=4))
    assert {*s['words']}=={'CM','BG'} and 'H.264' in s['words']['CM'] and all('against' in w for w in s['words'].values()); assert (tmp_path/'two'/'robustness').is_dir() and set(s['shaking'].detector)=={'BG','CM','STF'}
    assert s['chosen']=='stacked' and 'out of fold' in s['where'] and len(s['judged'])==30 and (tmp_path/'two'/'fusion.json').exists()
    oof = out_of_fold(s['val'], 'stacked', seed=0, least=2).set_index('video').score
    assert np.allclose(s['v'].set_index('video').score.dropna(), oof.reindex(s['v'].video).dropna()) and not {'stacked','mean','weighted'}&{*s['table'].index}

@pytest.mark.parametrize('change,words', [(dict(members='{room}/taught'), 'does not name on whom'), (dict(bg='', members='LL={room}/named/LL/stage_1'), 'trained on FaceForensics..:033'), (dict(split='test'), 'test part'), (dict(people=5), '5 of each'), (dict(members='{room}/none'), 'is no folder')], ids=str)
def test_integrate_refuses(room, tmp_path, change, words):
    given = dict(preset='tiny', bg=f'{room}/models/BG-abc', store=str(room/'store'), split='train,val', out=str(tmp_path))|{k:v.format(room=room) if isinstance(v, str) else v for k,v in change.items()}
    with pytest.raises((LeakError,FusionError), match=words): play('integrate', given)
