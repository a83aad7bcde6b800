"Handing a model on, by force: killed exports, two at once, folders with any byte changed, promises over random scores, licences that are not for commerce"
import json,os,random,re,shutil,signal,sys,time
import numpy as np,pandas as pd,pytest,torch
from common import count,ended,fork,told
from deepfake_nb.checkpoints import CheckpointError,load_model,save_checkpoint,save_weights
from deepfake_nb.export import Calibration,ExportError,export_main,export_model,export_team,load_exported,needed,_with_onnx
from deepfake_nb.fusion import fit_fusion
from deepfake_nb.pack import read_json
from deepfake_nb.specialists.base import SpecialistConfig
from deepfake_nb.specialists.team import build_specialist
from deepfake_nb.stf_mamba import STFConfig,build_stf_mamba

torch.set_num_threads(1)
def table(n, seed=0): r = np.random.default_rng(seed); y = np.arange(2*n)%2; return pd.DataFrame(dict(video=[f'v{i}' for i in range(2*n)], label=y, group=[f'g{i}' for i in range(2*n)], score=r.beta(2+2*y, 4-2*y)))

@pytest.fixture(scope='module')
def kept(tmp_path_factory):
    "A folder of three models that nobody trained, as small as they come"
    f = tmp_path_factory.mktemp('kept'); torch.manual_seed(0); said = dict(selection='never trained', trained_on=[dict(dataset='FaceForensics++', people=['p1','p2'])])
    save_weights(f, 'A', build_stf_mamba(STFConfig.tiny(backbone='test_efficientnet'), 'random'), extra=said|dict(length=4, qp=[23,40]))
    for c in ('BG','RR'): save_weights(f, c, build_specialist(SpecialistConfig(c, 'test_efficientnet', width=64), 'random'), extra=said)
    return f

@pytest.fixture(scope='module')
def made(kept): return export_model(f'{kept}#A', kept/'made', calibration=Calibration(table(60), 'drawn'))

def test_an_export_that_is_killed_leaves_no_model_or_a_whole_one(kept, made, tmp_path):
    n,r = count(8),random.Random(0); good = whole = 0; began = time.monotonic(); export_model(f'{kept}#A', tmp_path/'timed', calibration=Calibration(table(60), 'drawn')); took = time.monotonic()-began
    for i in range(n):
        out = tmp_path/f'm{i}'; pid = fork(lambda: export_model(f'{kept}#A', out, calibration=Calibration(table(60), 'drawn')) and 0)
        time.sleep(r.uniform(0, 3*took)); os.kill(pid, signal.SIGKILL); ended(pid)
        if out.exists(): whole += 1; good += load_exported(out).calibration.at()==load_exported(made).calibration.at()
        else: good += load_exported(export_model(f'{kept}#A', out)).sha256==load_exported(made).sha256 # what was left is in nobody's way
    told(good, n, f'killed exports that left nothing or a whole model (whole: {whole})', 0)

def test_a_replacement_that_is_killed_never_leaves_half(kept, made, tmp_path):
    n,r = count(6),random.Random(1); good = 0
    for i in range(n):
        out = tmp_path/f'm{i}'; shutil.copytree(made, out); old = read_json(out/'card.json')['files']
        pid = fork(lambda: export_model(f'{kept}#BG', out, force=True) and 0); time.sleep(r.uniform(0, 1)); os.kill(pid, signal.SIGKILL); ended(pid)
        at = out if out.exists() else tmp_path/f'.m{i}.old' # between two renames the old one has another name
        good += load_exported(at).card['files'] in (old, read_json(kept/'BG.json')['files']) or load_exported(at).card['model']=='Specialist'
    told(good, n, 'killed replacements that left a whole model', 1)

def hidden(place): return sorted(p.name for p in place.iterdir() if p.name[0]=='.')

def test_killed_between_two_renames(kept, made, tmp_path):
    "The one moment without a model under its name: who asks for it is told where it is, and the next export puts it back"
    out,real = tmp_path/'m',os.rename; shutil.copytree(made, out)
    def last(a, b): real(a, b); str(b).endswith('.old') and os.kill(os.getpid(), signal.SIGKILL)
    def child(): os.rename = last; export_model(f'{kept}#BG', out, force=True)
    ended(fork(child)); assert not out.exists() and {'.m.old','.m.part'}<={*hidden(tmp_path)}
    with pytest.raises(ExportError, match=r'killed here, and the model that it was to replace is \.m\.old'): load_exported(out)
    with pytest.raises(ExportError, match='there already'): export_model(f'{kept}#BG', out)
    assert load_exported(out).card['model']=='STFMamba' and not hidden(tmp_path)
    assert load_exported(export_model(f'{kept}#BG', out, force=True)).card['model']=='Specialist' and not hidden(tmp_path)

def test_what_lies_in_the_folder_and_is_not_ours(kept, made, tmp_path):
    out = shutil.copytree(made, tmp_path/'m'); (out/'notes').mkdir(); (out/'notes'/'mine.txt').write_text('precious'); save_checkpoint(out, 1, load_model(kept, 'BG'), {})
    with pytest.raises(ExportError, match='holds what no export wrote.*000001-step00000001.json'): export_model(f'{kept}#A', out, force=True)
    e = load_exported(out); assert (out/'notes'/'mine.txt').read_text()=='precious' and any('mine.txt' in s for s in e.about['said'])
    (out/'frames.onnx').write_bytes(b'x'); assert any('frames.onnx' in s for s in load_exported(out).about['said'])
    x = torch.randint(0, 256, (1,4,3,64,64), dtype=torch.uint8); assert torch.equal(load_model(out).score(x), e.detector.model.score(x)) # not the checkpoint beside it

def test_places_that_cannot_be_written(kept, tmp_path, capsys):
    (tmp_path/'file').write_text('')
    for out in (tmp_path/'file'/'m', '/proc/nowhere/m'): assert export_main([f'{kept}#A', '--to', str(out)])==1; assert 'cannot be written there' in (e := capsys.readouterr().err) and '--to' in e and 'Traceback' not in e

def test_a_card_that_does_not_say_how_long_a_clip_is(kept, tmp_path, capsys):
    save_weights(tmp_path/'old', 'A', load_model(kept, 'A'), extra=dict(selection='x', trained_on=[]))
    assert export_main([f'{tmp_path}/old#A', '--to', str(tmp_path/'m')])==1; e = capsys.readouterr().err; assert f'{tmp_path}/old: its card' in e and '--length' in e and '.part' not in e
    assert export_main([f'{tmp_path}/old#A', '--to', str(tmp_path/'m'), '--length', '4'])==0 and load_exported(tmp_path/'m').length==load_exported(export_model(tmp_path/'m', tmp_path/'again')).length==4

def test_errors_name_the_folder_that_was_asked_for(kept, tmp_path):
    with pytest.raises(ExportError, match='trained on') as e: export_model(f'{kept}#A', tmp_path/'m', calibration=Calibration(table(20).assign(group=['p1']*40), 'drawn'))
    assert e.value.path==tmp_path/'m'/'calibration.csv' and not hidden(tmp_path) and not (tmp_path/'m').exists()

@pytest.mark.parametrize('lacking', ['onnx','onnxscript','onnxruntime'])
def test_onnx_without_its_packages(kept, tmp_path, monkeypatch, capsys, lacking):
    monkeypatch.setitem(sys.modules, lacking, None); assert export_main([f'{kept}#A', '--to', str(tmp_path/'m'), '--onnx'])==1
    e = capsys.readouterr().err; assert f'pip install' in e and lacking in e and not list(tmp_path.iterdir())

def test_a_model_that_has_no_onnx(tmp_path):
    class Odd(torch.nn.Module):
        def backbone(self, x): return x if x.float().mean().item()>3 else -x
    with pytest.raises(ExportError, match='cannot be written'): _with_onnx(Odd(), tmp_path, 4)

def test_people_it_was_chosen_on(kept, tmp_path):
    save_weights(tmp_path, 'C', load_model(kept, 'A'), extra=dict(length=4, selection='best on g0', trained_on=[dict(dataset='FaceForensics++', people=['p1'], chosen_on=['g0','g1','g2','x'])]))
    e = load_exported(export_model(f'{tmp_path}#C', tmp_path/'m', calibration=Calibration(table(30), 'drawn'))); assert e.about['chosen']==3 and '3 of the 60 people' in e.about['said'][0]
    assert 'on 3 of these people the checkpoint was chosen' in (e.folder/'README.md').read_text()

def test_words_of_a_stranger_are_words(kept, tmp_path):
    save_weights(tmp_path, 'W', load_model(kept, 'A'), extra=dict(length=4, selection='![x](http://a.b/p.png) [safe](javascript:alert(1))\n# Results\n* all _good_', trained_on=[dict(dataset='[a](http://b.c)', stage='**x**')]))
    text = (export_model(f'{tmp_path}#W', tmp_path/'m')/'README.md').read_text(); assert not re.search(r'(?<!\\)[][](?!\w* ?%)|(?<!\\):/(?!/?\w)|://', text.split('# W')[1]) and text.count('\n# ')==1
    for bad in ('mit\ntags: [x]', 'a b', 'x'*99):
        with pytest.raises(ExportError, match='no identifier'): export_model(f'{tmp_path}#W', tmp_path/'n', licence=bad)

def test_two_exports_at_once_one_folder(kept, tmp_path):
    n = count(3); good = 0
    for i in range(n):
        out = tmp_path/f'm{i}'
        def one(what):
            try: export_model(f'{kept}#{what}', out)
            except ExportError as e: return 3 if 'there already' in e.reason or 'here first' in e.reason else 4
        codes = [ended(p) for p in [fork(lambda w=w: one(w)) for w in ('A','BG')]]
        good += sorted(codes)==[0,3] and load_exported(out).card['model']==('STFMamba','Specialist')[codes.index(0)] and not list(tmp_path.glob(f'.m{i}.*'))
    told(good, n, 'races that one of two won', 0)

def test_any_byte_changed_is_refused_or_changes_nothing(made, tmp_path):
    n,r = count(60),random.Random(2); x = torch.randint(0, 256, (1,4,3,64,64), dtype=torch.uint8); whole = load_exported(made); said = whole.detector.model.score(x); good = refused = 0
    files = [p.relative_to(made) for p in made.rglob('*') if p.is_file()]; said_by = {w:0 for w in map(str, files)}
    for i in range(n):
        bad = tmp_path/f'b{i}'; shutil.copytree(made, bad); p = bad/r.choice(files); data = bytearray(p.read_bytes()); how = r.randrange(3)
        if how==0: data[r.randrange(len(data))] ^= 1<<r.randrange(8)
        elif how==1: del data[r.randrange(len(data)):]
        else: a = r.randrange(len(data)); data[a:a] = bytes(r.randrange(256) for _ in range(r.randrange(1, 50)))
        p.write_bytes(data)
        try: e = load_exported(bad); good += torch.equal(e.detector.model.score(x), said) and (e.calibration is None or e.calibration.table.equals(whole.calibration.table))
        except CheckpointError as err: good += bool(err.remedy) and str(bad) in str(err.path); refused += 1; said_by[str(p.relative_to(bad))] += 1
        shutil.rmtree(bad)
    assert refused>n/4; told(good, n, f'damaged folders refused ({refused}) or harmless', 2)

def test_cards_of_a_stranger(made, tmp_path):
    "Any value of the card of any kind: an error with a remedy, or the same model"
    n,r = count(60),random.Random(3); odd = [None,[],{},'',-1,0,1e308,True,'x'*10**4,[[]],{'a':{}},'../../etc',2**70,[None],'\x00',['p'],[{'a':1}]]; good = opened = 0
    def spots(d, at=()):
        for k in d if isinstance(d, dict) else range(len(d)):
            yield (*at, k)
            if isinstance(d[k], (dict,list)): yield from spots(d[k], (*at, k))
    for name in ('card.json','calibration.json'):
        base = read_json(made/name); all_ = list(spots(base)); bad = tmp_path/name; shutil.copytree(made, bad)
        for i in range(n//2):
            d = json.loads(json.dumps(base)); *way,last = r.choice(all_); at = d
            for k in way: at = at[k]
            at[last] = r.choice(odd); (bad/name).write_text(json.dumps(d))
            try: e = load_exported(bad); opened += 1; good += e.detector.sha256==load_exported(made).sha256
            except CheckpointError as e: good += bool(e.reason)
    told(good, n//2*2, f'cards with an odd value refused or harmless (opened: {opened})', 3)

def test_promises(kept):
    n = count(300); good = 0
    for i in range(n):
        r = np.random.default_rng(i); t = table(int(r.integers(1, 80)), i); t = t if r.random()<.7 else t.assign(score=t.score.round(1)); f,m = r.uniform(.01, .6, 2); p = Calibration(t, 'drawn').at(f, m); k,q = ((t.label==y).sum() for y in (0,1))
        ok = ((p.fake_at is None)==(k<needed(f)) or t.score[t.label==0].max()==1) and ((p.real_at is None)==(q<needed(m)) or t.score[t.label==1].min()==0)
        if p.fake_at is not None: ok &= p.false_alarms['k']<=f*(k+1)-1+1e-6 and p.false_alarms['k']==(t.score[t.label==0]>=p.fake_at).sum() and p.false_alarms['lo']-1e-12<=p.false_alarms['k']/k<=p.false_alarms['hi']+1e-12
        if p.real_at is not None: ok &= p.misses['k']<=m*(q+1)-1+1e-6
        if None not in (p.fake_at, p.real_at): ok &= p.real_at<p.fake_at
        good += bool(ok)
    told(good, n, 'thresholds that keep what they promise on their own rows', 0)

def test_promises_to_people(kept):
    "However many rows of a person: the shares of the seen ones and a whole unseen one stay below the rate, and one step lower they don't"
    n = count(200); good = 0
    for i in range(n):
        r = np.random.default_rng(i); rows = r.integers(1, r.choice([2,5,60]), r.integers(1, 60)); who = np.repeat(np.arange(len(rows)), rows); s = r.beta(2, 3, len(who)); s = s if i%3 else s.round(1); rate = r.uniform(.01, .6)
        t = pd.DataFrame(dict(label=[0]*len(s)+[1]*len(s), group=[f'g{i}' for i in who]*2, score=np.r_[s,1-s])); p = Calibration(t, 'drawn').at(rate, rate); P = len(rows); over = lambda at: (pd.Series(s>=at).groupby(who).mean()).sum()+1
        if P<needed(rate): good += p.fake_at is None and p.real_at is None and f"{'person' if P==1 else 'people'} can promise" in p.note; continue
        at = p.fake_at
        if at is None: good += over(1)>rate*(P+1)-1e-6 and 'score 1' in p.note; continue
        ok = over(at)<=rate*(P+1)+1e-6 and (over(np.nextafter(at, -2))>rate*(P+1)-1e-6 or 'one cut' in p.note)
        good += bool(ok and p.false_alarms['people']==P and abs(p.false_alarms['share']-(over(at)-1)/P)<1e-9 and (abs(p.misses['share']-p.false_alarms['share'])<1e-9 or 'one cut' in p.note) and p.false_alarms['lo']-1e-9<=p.false_alarms['share']<=p.false_alarms['hi']+1e-9)
    told(good, n, 'thresholds that keep what they promise people', 0)

def test_weights_that_are_not_for_commerce_say_so(tmp_path):
    torch.manual_seed(0); save_weights(tmp_path, 'N', build_stf_mamba(STFConfig.tiny(backbone='convnextv2_atto', stride=32, pad='zero'), 'random'), extra=dict(length=4, selection='x', trained_on=[dict(dataset='Celeb-DF-v2', people=['id1'])]))
    text = (export_model(f'{tmp_path}#N', tmp_path/'out')/'README.md').read_text()
    assert 'license: cc-by-nc-4.0' in text and 'Not for commercial use' in text and 'research, not commerce' in text and 'no calibration' in text and 'None was exported with it' in text

def test_a_team_goes_through(kept, tmp_path):
    team = {n:load_exported(f'{kept}#{n}').members[n] for n in ('A','BG','RR')}; t = table(30, 5).drop(columns='score'); r = np.random.default_rng(0)
    t = t.assign(**{n:1/(1+np.exp(-(t.label*2-1)*.8-r.normal(size=60))) for n in team})
    f = fit_fusion(t, 'weighted', about=dict(members={n:dict(folder=str(kept), weights=n, sha256=d.sha256) for n,d in team.items()})); f.save(tmp_path/'f'/'fusion.json')
    e = load_exported(export_team(tmp_path/'f', out=tmp_path/'team', calibration=Calibration(t.assign(score=f(t)), 'drawn')))
    assert set(e.members)==set(f.weights) and e.fusion(t).equals(f(t)) and e.about['people']==2 and {x for d in e.members.values() for x in d.extras}==set(e.extras)
    again = load_exported(export_team(export_team(e.folder, out=tmp_path/'x'/'licensed', licence='mit'), out=tmp_path/'again')) # from anywhere, with all it has
    assert again.calibration.table.equals(e.calibration.table) and again.sha256==e.sha256 and 'license: mit' in (again.folder/'README.md').read_text()
    with pytest.raises(ExportError, match='is a team'): export_model(e.folder, tmp_path/'one')
    for p in (e.folder/'members'/'BG').glob('card*'): shutil.copy(p, again.folder)
    with pytest.raises(ExportError, match='nobody can say which'): load_exported(again.folder)
    for n in e.members: assert load_model(e.folder/'members'/n) is not None
    assert '2 people in all' in (e.folder/'README.md').read_text() and 'p1' not in (e.folder/'README.md').read_text()
