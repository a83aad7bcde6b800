"Predictions in and out of DeepfakeBench, and results beside each other: round trips, hostile files, names that collide, levels that must not mix"
import json,pickle,random,zipfile
from io import BytesIO
from pathlib import Path
import numpy as np,pandas as pd,pytest
from common import count,told
from deepfake_nb.bench import BenchError,Written,image_of,place_of,read_predictions,write_predictions
from deepfake_nb.compare import FORMAT,LEVELS,PUBLISHED,ResultError,as_text,compare,differences,load_result,side_by_side
from deepfake_nb.executors import notebook
from deepfake_nb.metrics import aggregate,auc,video_of
from deepfake_nb.protocol import Scored,judge_target,write_result,result as of_protocol
from deepfake_nb.runs import run_stage
from deepfake_nb.scoring import Detector,video_table

METHODS = ('Deepfakes','Face2Face','FaceSwap','NeuralTextures')
COLUMNS = ['key','label','start','score']

def ff_rows(frames=5, seed=0):
    "140 reals and four methods that forge each of them under one folder name"
    r = np.random.default_rng(seed)
    return pd.DataFrame([dict(key=f'FaceForensics++/{m}/c23/{f"{v:03}" if m=="real" else f"{v:03}_{v^1:03}"}#0', label=int(m!='real'), start=t, score=float(s)) for i,m in enumerate(('real',*METHODS)) for v in range(140) for t,s in enumerate(1/(1+np.exp(-r.normal(.6*i, 1, frames))))])

def by_folder(d):
    "A video is the name of the folder"
    return d.assign(at=d.img_names.str.split('/').str[-2]).groupby('at').agg(score=('y_pred','mean'), label=('y_true','mean'))

@pytest.mark.parametrize('end', ['csv','json','npz'])
def test_round_trip_of_five_times_140_videos_that_share_their_names(tmp_path, end):
    rows = ff_rows(); f = tmp_path/f'x.{end}'
    assert write_predictions(rows, f)==Written(len(rows), 0, [])
    back = read_predictions(f); pd.testing.assert_frame_equal(back[COLUMNS], rows, check_exact=True)
    a = aggregate(back); assert len(a)==700 and (a.label==1).sum()==560 and (a.clips==5).all() and back.group.nunique()==70
    if end=='csv': t = by_folder(pd.read_csv(f)); assert len(t)==280 and abs(auc(t.score, t.label.astype(int))-auc(a.score, a.label))>.03
    if end=='npz': assert {k:v.dtype.kind for k,v in np.load(f, allow_pickle=False).items()}==dict(img_names='U', y_pred='f', y_true='i')

def any_key(r):
    "A key as somebody might have it, its label"
    n,c = f'{r.randrange(1000):03}',r.choice(('raw','c23','c40')); kind = r.randrange(9)
    if kind==0: m = r.choice(('real',*METHODS,'FaceShifter')); k,y = f'FaceForensics++/{m}/{c}/{n}',m!='real'
    elif kind==1: y = r.random()<.5; k = f"DeepFakeDetection/{'DeepFakeDetection' if y else 'real'}/{c}/01_02__walking outside__{n}"
    elif kind==2: y = r.random()<.5; k = f"Celeb-DF-v{r.choice('12')}/{'Celeb-synthesis' if y else 'real'}/{r.choice(('as_is','c40'))}/{r.choice(('id1_','00'))}{n}"
    elif kind==3: m = r.choice(('real','method_A','method_B')); k,y = f'DFDC-preview/{m}/as_is/{n}',m!='real'
    elif kind==4: y = r.random()<.5; k = f"DFDC/{('real','fake')[y]}/as_is/{r.choice(('','dfdc_train_part_3/'))}abc{n}.mp4"
    elif kind==5: m = r.choice(('studio','end_to_end','end_to_end_level_1')); k,y = f'DeeperForensics-1.0/{m}/as_is/{n}',m!='studio'
    elif kind==6: y = r.random()<.5; k = f"UADFV/{('real','fake')[y]}/as_is/{n}"
    elif kind==7: k,y = f'FaceForensics++/self-blended/{c}/{n}',True
    else: y = r.random()<.5; k = f"my clips/{r.choice(('real','fake','odd'))}/as_is/{r.choice(('a b','frames/x','ü#3','t1_5','deepfake_nb'))}/{n}.mp4"
    return f'{k}#{r.choice((0,0,0,1,12))}',int(y)

def test_round_trip_of_any_key(tmp_path):
    n,seed = count(2000),random.randrange(10**6); r,rows,labels = random.Random(seed),{},{}
    while len(rows)<n:
        k,y = any_key(r); v = video_of(k); y = labels.setdefault((v.split('/')[0], *v.split('/')[2:]) if v.startswith('DFDC/') else v, y)
        if not v.startswith('DFDC/') or v.split('/')[1]==('real','fake')[y]: rows[k,start] = dict(key=k, label=y, start=start, score=r.random()) if (start := r.choice((0, 7, 999, 1000, 123456))) is not None else None
    rows = pd.DataFrame(rows.values()); ok = 0
    for end in ('csv','json','npz'):
        write_predictions(rows, tmp_path/f'x.{end}'); back = read_predictions(tmp_path/f'x.{end}', studio=True)
        pd.testing.assert_frame_equal(back[COLUMNS], rows, check_exact=True)
    for x in rows.itertuples(): p = place_of(image_of(x.key, x.start, x.label)); ok += p.label in (None, x.label) and p.start==x.start
    told(ok, n, 'keys came back as they were', seed)

def test_what_is_lost_is_said(tmp_path):
    d = ff_rows(2).assign(abstains=False); d.loc[d.key.str.contains('Deepfakes/c23/000_001'), ['score','abstains']] = np.nan,True; d.loc[5, 'score'] = np.nan
    assert write_predictions(d, tmp_path/'x.csv')==Written(len(d)-3, 3, ['FaceForensics++/Deepfakes/c23/000_001'])
    assert len(read_predictions(tmp_path/'x.csv'))==len(d)-3
    with pytest.raises(BenchError, match='nothing to write'): write_predictions(d.assign(score=np.nan), tmp_path/'y.csv')
    assert not (tmp_path/'y.csv').exists()

GOOD = 'FaceForensics++/manipulated_sequences/Deepfakes/c23/frames/000_003/016.png'

class Trap:
    def __reduce__(self): return (exec, ("open('sprung','w').close()",))

def test_no_pickle_is_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); bomb = pickle.dumps(Trap())
    traps = np.array([Trap()], dtype=object); buf = BytesIO(); np.lib.format.write_array(buf, traps, allow_pickle=True)
    with zipfile.ZipFile('array.npz', 'w') as z: z.writestr('img_names.npy', buf.getvalue()); z.writestr('y_pred.npy', buf.getvalue()); z.writestr('y_true.npy', buf.getvalue())
    with zipfile.ZipFile('member.npz', 'w') as z: z.writestr('img_names.npy', bomb)
    with zipfile.ZipFile('other.npz', 'w') as z: z.writestr('img_names', bomb)
    for name in ('a.pkl','a.pickle','a.pt','a.npz','a.json','a.csv','a.npy'): (tmp_path/name).write_bytes(bomb)
    for f in sorted(tmp_path.iterdir()):
        with pytest.raises(BenchError if f.suffix!='.json' else Exception) as e: read_predictions(f)
        assert str(f) in str(e.value) and not (tmp_path/'sprung').exists(), f

def test_an_array_that_claims_too_much_is_refused_at_once(tmp_path):
    head = BytesIO(); np.lib.format.write_array_header_1_0(head, dict(descr='<f8', fortran_order=False, shape=(10**11,)))
    with zipfile.ZipFile(tmp_path/'x.npz', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('y_pred.npy', head.getvalue())
    with pytest.raises(BenchError, match='says it is'): read_predictions(tmp_path/'x.npz')
    with zipfile.ZipFile(tmp_path/'y.npz', 'w', zipfile.ZIP_DEFLATED) as z:
        head = BytesIO(); np.lib.format.write_array_header_1_0(head, dict(descr='<f8', fortran_order=False, shape=(1<<26,)))
        with z.open('y_pred.npy', 'w') as f:
            f.write(head.getvalue())
            for _ in range(32): f.write(bytes(1<<24))
    with pytest.raises(BenchError, match='says it is'): read_predictions(tmp_path/'y.npz')

def test_hostile_files_give_an_error_that_names_the_file(tmp_path):
    "Bytes of good files changed, cut and doubled: rows or an error of ours, never anything else"
    n,seed = count(400),random.randrange(10**6); r,files = random.Random(seed),{}
    for end in ('csv','json','npz'): write_predictions(ff_rows(1)[::40], tmp_path/f'x.{end}'); files[end] = (tmp_path/f'x.{end}').read_bytes()
    from deepfake_nb.manifest import DatasetError
    for i in range(n):
        end = r.choice(list(files)); b = bytearray(files[end])
        for _ in range(r.randrange(1, 5)):
            at = r.randrange(len(b)); what = r.randrange(4)
            if what==0: b[at] = r.randrange(256)
            elif what==1: del b[at:at+r.randrange(1, 40)]
            elif what==2: b[at:at] = r.choice((b'\0', b'"', b',', b'\n', b'../', b'1e999', b'NaN', b'[', b'}', b'\xff', b'9'*400))
            else: b[at:at] = b[at:at+30]
            if not b: b = bytearray(b'x')
        (tmp_path/f'y.{end}').write_bytes(b)
        try: d = read_predictions(tmp_path/f'y.{end}'); assert d.score.between(0, 1).all() and d.label.isin((0,1)).all() and not d.duplicated(['key','start']).any()
        except DatasetError as e: assert f'y.{end}' in str(e), (seed, i, e)
    told(n, n, 'spoilt files read or refused', seed)

@pytest.mark.parametrize('text,says', [
    ('', 'no predictions'), ('path,score,label\n', 'no predictions'), (f'path,score\n{GOOD},.5\n', 'no column for the label'), (f'path,score,label\n{GOOD},.5\n', 'line 2: 2 fields'), (f'path,path,score,label\n{GOOD},a,.5,1\n', 'twice'),
    (f'path,score,label\n{GOOD},.5,1\n{GOOD.replace("c23","c22")},.5,1\n', 'line 3'), (f'path,score,label\n{GOOD},.5,0\n', 'line 2: label 0 says real'), (f'path,score,label\n{GOOD},-1,1\n', 'no probability'), (f'path,score,label\n{GOOD},.5,2\n', 'neither 0'),
    (f'path,score,label\n{GOOD},.5,1\n{GOOD.replace("/", chr(92))},.5,1\n', 'line 3: picture 16'), ('path,score,label\nFaceForensics++_c40/original_sequences/youtube/c23/frames/000/0.png,.5,0\n', 'goes on to c23'), ('path,score,label\n../../etc/FaceForensics++/x/0.png,.5,0\n', 'no safe path')])
def test_a_bad_line_is_named(tmp_path, text, says):
    (tmp_path/'x.csv').write_text(text)
    with pytest.raises(BenchError) as e: read_predictions(tmp_path/'x.csv')
    assert says in str(e.value) and str(tmp_path/'x.csv') in str(e.value)

# results

def result(folder, name='ours', seed=0, target='Celeb-DF-v2', relation='cross-dataset', level='clip', strength=1.5, trained='FaceForensics++', n=(178,340), share=1., only=None, fakes='forged', **change):
    "A result.json as the protocol writes it, with its scores.csv"
    r,v = np.random.default_rng([seed, len(name)]),np.random.default_rng(9).normal(0, 1, sum(n)); folder.mkdir(parents=True, exist_ok=True)
    d = pd.DataFrame([dict(key=f'{target}/{("real","x")[i>=n[0]]}/as_is/{i:04}#0', label=int(i>=n[0]), start=8*c, score=1/(1+np.exp(-(strength*(i>=n[0])+v[i]+r.normal(0, .5)))), group=f'g{i%50}') for i in range(sum(n)) for c in range(3)])
    d.to_csv(folder/'scores.csv', index=False); a = aggregate(d)
    def m(s, y): x = auc(s, y); return dict(auc=dict(value=x, lo=max(0, x-.02), hi=min(1, x+.02), method='', note=''))
    metrics = {'video':m(a.score, a.label), 'group':m(a.score, a.label), level:m(d.score, d.label), 'filled':m(a.score, a.label)}; metrics = {k:x for k,x in metrics.items() if only is None or k in only}
    t = dict(name=f'{target} test', dataset=target, compression='as_is', split='test', relation=relation, why='', fakes=fakes, data_hash='abc', counts=dict(clips=len(d), videos=sum(n), real_videos=n[0], fake_videos=n[1]), coverage=dict(expected=1000, scored=round(1000*share), share=share, missing=[]), metrics=metrics,
             frozen={}, calibration={}, risk={}, slices=[], controls={}, robustness=None, leakage='')
    det = dict(name=name, kind='stf', sha256=f'{name}{seed}', code_sha256='', config={}, selection='FF++ validation', trained_on=[dict(dataset=trained, compression='c23', split='train', videos=720, groups=720, made_here=True)], members=[])
    full = dict(format=FORMAT, made='2026-01-01T00:00:00Z', seed=seed, detector=det, protocol=dict(level=level, length=8 if level=='clip' else 1, clips=4, stride=1, size=224, margin=.3, aggregation='mean', fill=.5, precision='fp32', resamples=1000), source=None, targets=[t], cost={}, caveats=[]) | change
    (folder/'result.json').write_text(json.dumps(full)); return folder/'result.json'

def test_what_the_protocol_writes_is_read(tmp_path):
    result(tmp_path/'a'); rows = pd.read_csv(tmp_path/'a'/'scores.csv'); rows = rows.assign(source=rows.key.map(video_of), pair=range(len(rows)), abstains=rows.key.str.contains('/0003'), blend=False, light=120.); rows.loc[rows.abstains, 'score'] = np.nan
    d = Detector(None, 'V8', 'STFMamba', 8, (), 'a'*64, 'FF++ validation', (dict(dataset='FaceForensics++', people=['p']),))
    s = Scored('Celeb-DF-v2', rows, video_table(rows), {}, (), 'test', ('Celeb-DF-v2',), 'as_is', 'abc'); t = video_table(rows.assign(abstains=False).fillna(dict(score=.5))); s.table = t.assign(score=t.score.where(~t.video.str.contains('/0003')))
    path = write_result(tmp_path/'b', of_protocol(d, [judge_target(s, d)]), [s]); r = load_result(path); table = compare([r, tmp_path/'a'/'result.json'], 'CDFv2'); mine = table[table.method=='V8'].iloc[0]
    assert (mine.relation, mine.trained, mine.seeds)==('cross-dataset', 'FaceForensics++', 1) and .5<mine.lo<mine.auc<mine.hi<1 and mine.filled!=mine.auc and mine.coverage==517/518
    assert any('99.8% of the videos' in x for x in table.attrs['notes']) and differences([r, tmp_path/'a'/'result.json'], 'CDFv2', n=50).units.tolist()==[517]
    assert compare([r], 'CDFv2', 'clip').attrs['notes'] and 'V8' not in compare([r], 'CDFv2', 'frame').method.tolist()

def test_levels_never_mix(tmp_path):
    rs = [result(tmp_path/'a'), result(tmp_path/'b', 'framer', level='frame'), result(tmp_path/'c', 'only clips', only=('video','clip'))]
    for level in LEVELS:
        t = compare(rs, 'CDFv2', level); theirs = t[t.who=='published']
        assert set(t.level)=={level} and set(zip(theirs.method, theirs.auc))<={(p.method, p.auc) for p in PUBLISHED if p.level==level}
        assert set(t.method[t.who=='ours'])=={'video':{'ours','framer','only clips'}, 'frame':{'framer'}, 'clip':{'ours','only clips'}}[level] and (level=='video' or t.filled.isna().all())
    assert sum('is left out' in x for x in compare(rs, 'CDFv2', 'frame').attrs['notes'])==2
    for bad in ('both','video,frame','',None):
        with pytest.raises(ResultError, match='two levels are two tables'): compare(rs, 'CDFv2', bad)
    assert [(t.attrs['target'], t.attrs['level']) for t in side_by_side(rs)]==[('CDFv2','video'),('CDFv2','frame')]

def test_in_domain_is_never_ranked_among_cross_dataset(tmp_path):
    rs = [result(tmp_path/'a'), result(tmp_path/'b', 'seen it', strength=9., relation='in-domain', trained='Celeb-DF-v2'), result(tmp_path/'c', 'blends', strength=9., fakes='self-blends'), result(tmp_path/'d', 'who knows', strength=9., relation='unknown')]
    t = compare(rs, 'CDFv2'); cross = t[t.relation=='cross-dataset']
    assert set(cross.method[cross.who=='ours'])=={'ours'} and cross['rank'].min()==1 and (t.relation.ne(t.relation.shift()).cumsum().max()==4)
    for name,rel in (('seen it','in-domain'),('blends','self-made'),('who knows','unknown')): r = t[t.method==name].iloc[0]; assert (r.relation, r['rank'])==(rel, 1) and r.auc>cross.auc.max()
    assert any('block of their own' in x for x in t.attrs['notes']) and any('made here' in x for x in t.attrs['notes'])

def test_what_is_not_comparable_is_said(tmp_path):
    notes = compare([result(tmp_path/'a', n=(150,300), share=.871, caveats=['three people only'])], 'CDFv2').attrs['notes']
    for part in ('150 real and 300 fake videos; the official test has 178 and 340','87.1% of the videos','three people only','clips of 8 frames','one training','without an interval'): assert any(part in x for x in notes), part
    assert any('3,725' in x for x in compare([], 'DFDC').attrs['notes']) and not any('3,725' in x for x in notes)

def test_seeds_of_one_model_are_one_row(tmp_path):
    rs = [result(tmp_path/str(s), seed=s) for s in range(4)]; t = compare(rs, 'CDFv2'); r = t[t.who=='ours']; vs = [load_result(p)['targets'][0]['metrics']['video']['auc']['value'] for p in rs]
    assert len(r)==1 and (r.seeds.iloc[0], r.auc.iloc[0], r.sd.iloc[0])==(4, pytest.approx(np.mean(vs)), pytest.approx(np.std(vs, ddof=1)))
    with pytest.raises(ResultError, match='twice'): compare([rs[0], result(tmp_path/'again', seed=0)], 'CDFv2')
    other = json.loads(rs[1].read_text()); other['targets'][0]['data_hash'] = 'other films'; rs[1].write_text(json.dumps(other))
    assert sorted(compare(rs, 'CDFv2').seeds.dropna())==[1, 3] # not the same films: not one mean

def test_paired_differences(tmp_path):
    rs = [result(tmp_path/'a', 'strong', strength=2.), result(tmp_path/'b', 'weak', strength=1.), result(tmp_path/'c', 'part', strength=1.5)]
    s = pd.read_csv(tmp_path/'c'/'scores.csv'); s = s[~s.key.str.contains('/00[0-4]')]; s.to_csv(tmp_path/'c'/'scores.csv', index=False); d = json.loads(rs[2].read_text())
    a = aggregate(s); d['targets'][0]['metrics']['video']['auc'] = dict(value=auc(a.score, a.label), lo=None, hi=None); rs[2].write_text(json.dumps(d))
    t = differences(rs, 'CDFv2', n=300).set_index(['better','worse']); r = t.loc[('strong','weak')]
    assert r.units==518 and r.lo>0 and r.p<.01 and t.loc[('strong','part')].units==468 and t.loc[('strong','part')]['only one']==50 and (t.holm>=t.p).all()
    assert r.difference==pytest.approx(load_result(rs[0])['targets'][0]['metrics']['video']['auc']['value']-load_result(rs[1])['targets'][0]['metrics']['video']['auc']['value'])
    (tmp_path/'b'/'scores.csv').write_text((tmp_path/'a'/'scores.csv').read_text())
    with pytest.raises(ResultError, match='another evaluation'): differences(rs, 'CDFv2', n=50)

def test_any_field_that_is_lost_or_of_another_kind_is_an_error_or_harmless(tmp_path):
    "Every node of a result taken away or replaced: a clear error of ours, or a result that can be compared"
    p,ok = result(tmp_path/'a'),0; good = p.read_text()
    def nodes(x, at=()):
        yield at
        for k,v in (x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()): yield from nodes(v, (*at, k))
    cases = [(at, v) for at in nodes(json.loads(good)) if at for v in ('gone', None, 'text', -1, 2.5, True, [], {}, float('nan'))]
    for at,v in cases:
        d = x = json.loads(good)
        for k in at[:-1]: x = x[k]
        if v=='gone': del x[at[-1]]
        else: x[at[-1]] = v
        p.write_text(json.dumps(d))
        try:
            r = load_result(p)
            for level in ('video','clip'): as_text(compare([r], r['targets'][0]['name'], level))
            ok += 1
        except ResultError as e: ok += str(p) in str(e) or 'no result has it' in str(e) or 'which of' in str(e)
    assert ok==len(cases), (ok, len(cases))

@pytest.mark.parametrize('text,says', [('', 'not JSON'), ('[]', 'no result'), ('{"format":"deepfake_nb result 2"}', 'another version'), ('{"format":"deepfake_nb result 1"}', 'made is missing'), ('['*100000, 'not JSON')])
def test_other_files_are_refused(tmp_path, text, says):
    (tmp_path/'result.json').write_text(text)
    with pytest.raises(ResultError, match=says): load_result(tmp_path/'result.json')

def test_stage_compare(tmp_path):
    for s in range(2): result(tmp_path/'in'/f's{s}', 'V8', seed=s, strength=2.)
    result(tmp_path/'in'/'base', 'frame average', level='frame', strength=1.2)
    rec = run_stage(notebook('compare'), dict(results=str(tmp_path/'in'), out=str(tmp_path/'out'), resamples=100), runs=tmp_path/'runs')
    assert rec.state=='succeeded', rec['reason']
    m = {k:v for vs in rec.metrics.values() for k,v in vs.items()}; d = json.loads((tmp_path/'out'/'comparison.json').read_text())
    assert (m['results'], m['tables'], m['pairs'], m['targets'])==(3, 2, 3, 'CDFv2') and [x['level'] for x in d['tables']]==['video','frame'] and len(d['differences'][0]['rows'])==3
    assert {r['method'] for r in d['tables'][1]['rows'] if r['who']=='ours'}=={'frame average'} and '0.5 filled' in (tmp_path/'out'/'comparison.md').read_text()
    rec = run_stage(notebook('compare'), dict(results=str(tmp_path/'nothing')), runs=tmp_path/'runs'); assert rec.state=='failed' and 'evaluate stage' in rec['reason']

def test_pairs_of_self_blends_meet_their_own():
    "Two pairs of one moment are two pairs; the unit is the pair, and one film alone is no error"
    import numpy as np
    from deepfake_nb.compare import _difference
    r = np.random.default_rng(0); at = [(f, p, l) for f in range(12) for p in range(5) for l in (0,1)]
    rows = lambda s: pd.DataFrame([dict(video=f"pack/{('real','self-blended')[l]}/as_is/{f}#0", source=f'pack/real/as_is/{f}', pair=5*f+p, start=p//2, label=l, group=str(f), blend=bool(l), score=float(np.clip(.5+.2*l*s+.2*r.normal(), 0, 1))) for f,p,l in at])
    a,b = rows(2.),rows(.5); d = _difference('a', 'b', a, b, 'clip', 200, 0)
    assert d['only one']==0 and d['units']==60 and d['better']=='a' and d['lo']>0
    one = lambda x: x[x.video.str.endswith('/0#0')].assign(pair=0); lone = _difference('a', 'b', one(a).drop_duplicates('label'), one(b).drop_duplicates('label'), 'clip', 50, 0)
    assert lone['only one']==0 and (lone['lo'] is None or lone['method'])

def test_kept_results_are_read_and_a_model_of_frames_may_be_shown_clips(tmp_path):
    "The records of the demonstration; a model of clips has no frames to show"
    kept = Path(__file__).parent.parent/'records'/'evaluation_pack'; a,b = (load_result(kept/f'{p}.json') for p in 'AB')
    assert (a.name, b.name)==('phase_a_best','phase_b_best') and a['targets'][0]['counts']['pairs']==60
    d = json.loads((kept/'A.json').read_text()); d['protocol']['level'] = 'frame'; (tmp_path/'r.json').write_text(json.dumps(d)); assert load_result(tmp_path/'r.json')['protocol']['level']=='frame'
    d['protocol']['level'] = 'clip'; m = d['targets'][0]['metrics']; m['frame'] = m['clip']; (tmp_path/'r.json').write_text(json.dumps(d))
    with pytest.raises(ResultError, match='the protocol is by clip'): load_result(tmp_path/'r.json')
