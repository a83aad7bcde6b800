"Every stage at toy size, through the real runner, in a home of its own that shares only the sample pack"
import json,os,shutil,subprocess,sys
from pathlib import Path
import nbformat,pytest
from deepfake_nb.journal import read_rows
from deepfake_nb.pack import home,read_json,sample
from deepfake_nb.executors import LocalExecutor,notebook
from deepfake_nb.plan import STF,demo,demo_plan,run
from deepfake_nb.runs import Record,declared,index,run_stage
from deepfake_nb.video import VideoFile,write_video

@pytest.fixture(scope='module')
def room(tmp_path_factory):
    "An empty home with the pack in it"
    d = tmp_path_factory.mktemp('stages'); sample('woman'); (d/'home').mkdir()
    (d/'home'/'pack').symlink_to(home()/'pack', target_is_directory=True)
    old,os.environ['DEEPFAKE_NB_HOME'] = os.environ.get('DEEPFAKE_NB_HOME'),str(d/'home')
    yield d
    if old is None: del os.environ['DEEPFAKE_NB_HOME']
    else: os.environ['DEEPFAKE_NB_HOME'] = old

@pytest.fixture(scope='module')
def own(room):
    "A folder as a user would give it: five people, one with two films, and a text file. (Three of them are pieces of one film: this tests machinery, not detectors)"
    d = room/'my clips'
    for n,who in (('carphone','bob'),('man','carl')): (d/who).mkdir(parents=True); shutil.copy(sample(n), d/who/f'{n}.mp4')
    frames,_ = VideoFile(sample('woman')).read(0, 96)
    for i,who in enumerate(('ann','dora','eve')): (d/who).mkdir(); write_video(d/who/'film.mp4', frames[32*i:32*i+32], rate=24)
    shutil.copy(sample('carphone'), d/'bob'/'again.mp4'); (d/'notes.txt').write_text('not a film')
    return d

def records(runs): return [Record.load(p) for p in sorted(p for p in runs.iterdir() if p.is_dir())]

def last(rec): return {k:v for vs in rec.metrics.values() for k,v in vs.items()}

def test_every_parameter_is_explained():
    for stage in STF:
        known = declared(notebook(stage))
        assert {'preset','videos','seed'} <= set(known) and all(p['help'] for p in known.values()), stage

def test_a_stage_without_its_store_says_what_to_do(room):
    rec = run_stage(notebook('phase_a'), dict(preset='tiny', videos=str(room)), runs=room/'runs')
    assert rec.state=='failed' and 'prepare the videos first' in rec['reason']

def test_the_plan_twice_on_the_sample_clips(room, capsys):
    runs = room/'pack runs'
    given = dict(preset='tiny', held_out='carman'); assert demo(given, runs)==0
    said = capsys.readouterr().out
    assert 'rehearsal gate on self-blends' in said and '3 people are a demonstration' in said
    p,a,e,b,f = (last(r) for r in records(runs))
    assert p['people']==3 and p['reused']==0 and p['unseen']=='carman' and 'last checkpoint of the fixed schedule' in p['rule']
    assert a['steps']==4 and a['reason']=='steps' and a['resumed']==0
    assert 0<=e['auc_lo']<=e['auc']<=e['auc_hi']<=1 and e['judged']['within']=='within one person' and e['judged']['counts']['people']==1
    assert e['gate'] in ('phase_b','stop','more_phase_a') and e['judged']['data_hash']==p['data_hash'] and e['phase']=='a'
    # Phase B grew out of those very weights, is marked where the gate said no, and is judged on the same pairs
    assert b['grown_from']==a['model_sha256']!=b['model_sha256'] and b['steps']==4 and b['gate_said']==e['gate']
    assert b['loaded']>100 and b['dropped']>0 and b['fresh']>0
    assert b['rehearsal']==f['rehearsal']==(e['gate']!='phase_b') and (('as a rehearsal' in said)==b['rehearsal'])
    assert f['phase']=='b' and f['gate']=='' and f['judged']['model_sha256']==b['model_sha256'] and f['judged']['counts']==e['judged']['counts']
    assert 'evaluate A' in said and 'evaluate B' in said
    # the second time nothing is missing: nothing runs, and the same words come
    assert demo(given, runs)==0 and len(records(runs))==5
    assert capsys.readouterr().out.splitlines()==[l for l in said.splitlines() if not l.endswith(' ...')]
    # though it is done, again: what lies there is used, and all comes out the same
    with LocalExecutor(runs) as ex: assert run(demo_plan(given), ex, again=tuple(demo_plan(given)))==0
    p2,a2,e2,b2,f2 = (last(r) for r in records(runs)[5:])
    assert p2['reused']==6 and a2['resumed']==4 and b2['resumed']==4
    assert (e2['auc'],f2['auc'])==(e['auc'],f['auc']) and (a2['model_sha256'],b2['model_sha256'])==(a['model_sha256'],b['model_sha256'])
    assert set(index(runs).state)=={'succeeded'}

def test_own_folder_validation_people_and_a_real_gate(room, own):
    given,runs = dict(preset='tiny', videos=str(own)),room/'own runs'
    prep = run_stage(notebook('prepare'), given, runs=runs).check()
    assert last(prep)['people']==5 and last(prep)['skipped']==1 and last(prep)['videos']==6
    train = run_stage(notebook('phase_a'), given, runs=runs).check()
    assert 'checkpoints are chosen on' in last(train)['selection']
    card, = (room/'home'/'checkpoints').glob('phase_a-my clips-*/phase_a_best.json')
    judged = [r['evaluation']['auc'] for r in read_rows(train.folder) if 'evaluation' in r]
    assert len(judged)==3 and read_json(card)['extra']['best']==max(judged)
    leaky,gate = room/'leaky',room/'gate set' # a film of somebody who was trained on is found by its bytes, whatever it is called now
    for label,who in (('real','bob'),('fake','ann')): (leaky/label).mkdir(parents=True); shutil.copy(next((own/who).glob('*.mp4')), leaky/label/'one.mp4')
    bad = run_stage(notebook('evaluate'), given|dict(gate_videos=str(leaky)), runs=runs); assert bad.state=='failed' and 'are the same file' in bad['reason']
    frames,_ = VideoFile(sample('woman')).read(100, 128)
    for i,name in enumerate(('real/one','real/two','fake/one','fake/two')): write_video(gate/f'{name}.mp4', frames[32*i:32*i+32], rate=24)
    rec = run_stage(notebook('evaluate'), given|dict(gate_videos=str(gate)), runs=runs).check()
    assert last(rec)['gate_name']=='gate on gate set' and last(rec)['judged_on_fakes']['counts']['fake_videos']==2
    assert (last(train)['rejected'], last(rec)['rejected'])==(0,0) # every clip could be forged, and that is said

def test_phase_b_listens_to_the_gate(room):
    no = run_stage(notebook('phase_b'), dict(preset='tiny', held_out='carman', gate='stop'), runs=room/'gated')
    assert no.state=='failed' and 'the gate says stop' in no['reason'] and 'rehearsal=True' in no['reason']
    none = run_stage(notebook('phase_b'), dict(preset='tiny', held_out='carman', seed=11), runs=room/'gated')
    assert none.state=='failed' and 'no such model' in none['reason']

def test_an_ablation_trains_nothing_twice_and_promises_nothing(room):
    given,runs = dict(preset='tiny', variants='Phase A,Hydra for Bi-Mamba', seeds='0'),room/'ablation'
    a,b = (last(run_stage(notebook('ablation'), given, runs=runs).check()) for _ in range(2))
    assert (a['trained'],a['reused'],b['trained'],b['reused'])==(2,0,0,2) and a['table']==b['table']
    assert len(a['learned_on'])==1 and [r['verdict'] for r in a['table']]==['','one seed'] and a['choosing'] is False
    assert 'pairs of that person only' in a['note'] and 'One seed' in a['note']
    bad = run_stage(notebook('ablation'), dict(preset='tiny', variants='Phase X'), runs=runs)
    assert bad.state=='failed' and "no variant is called 'Phase X': there are 'frame average'" in bad['reason']

def test_missing_weights_are_an_error(room):
    run_stage(notebook('prepare'), dict(preset='full', videos='', size=96), runs=room/'full').check()
    rec = run_stage(notebook('phase_a'), dict(preset='full', store=str(next((room/'home'/'store').glob('pack-*')))), runs=room/'full')
    assert rec.state=='failed' and 'no weights are named' in rec['reason']

def test_a_budget_that_is_spent_stops_in_time_and_says_so(room):
    rec = run_stage(notebook('phase_a'), dict(preset='tiny', seed=5, budget=1e-6), runs=room/'poor')
    assert rec.state=='succeeded' and last(rec)['reason']=='budget' and last(rec)['steps']<4

def test_plain_papermill_works(room):
    out = room/'plain.ipynb'
    subprocess.run([sys.executable,'-m','papermill','--no-progress-bar',notebook('prepare'),out,'-p','preset','tiny','-p','seed','3'], check=True, capture_output=True)
    cells = nbformat.read(out, 4).cells
    assert any('seed = 3' in c.source for c in cells if 'injected-parameters' in c.metadata.get('tags', []))
