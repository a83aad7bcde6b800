"Plans through real runs: order, parallel, once, cut off, failed, the gate's three words and a real ledger, two runners on one folder, kills and signals. Stages are notebooks of a few lines. SOAK=N for the long count."
import json,os,random,signal,subprocess,sys,time
from dataclasses import replace
from pathlib import Path
import nbformat as nbf,pytest
from common import count,told,wait_for,ended,fork
from deepfake_nb.budget import Ledger
from deepfake_nb.executors import LocalExecutor
from deepfake_nb.pack import read_json,write_json
from deepfake_nb.plan import Board,Out,Plan,PlanError,Task,five_dollar_plan,plan_figure,run,show
from deepfake_nb.runs import Record,_family

MIME = 'application/vnd.deepfake.metrics+json'

@pytest.fixture(autouse=True)
def one_thread(monkeypatch): monkeypatch.setenv('OMP_NUM_THREADS', '1')

def stage(path, body, leaves, /, **params):
    "A stage of three cells: parameters, what it does, what it leaves; each start is a line in `log` beside it"
    cells = [nbf.v4.new_code_cell('\n'.join(f'{k}: {type(v).__name__} = {v!r}  # {k}' for k,v in params.items()), metadata=dict(tags=['parameters'])),
             nbf.v4.new_code_cell(f"import time,os,json\nfrom pathlib import Path\nlog = Path({str(path.parent/'log')!r})\ndef note(w): f = os.open(log, os.O_APPEND|os.O_CREAT|os.O_WRONLY); os.write(f, f'{{w}}\\n'.encode()); os.close(f)\n{body}"),
             nbf.v4.new_code_cell(f"display({{{MIME!r}:dict({leaves})|dict(name={path.stem!r})}}, raw=True)")]
    nbf.write(nbf.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))), path)
    return str(path)

def log(room): return (room/'log').read_text().split() if (room/'log').exists() else []

def go(plan, room, slots=1, **kw):
    "Run a plan; exit status and what was said"
    said = []
    with LocalExecutor(room/'runs', slots, devices=['0']) as ex: code = run(plan, ex, room/'state', say=said.append, **dict(dict(tick=.2), **kw))
    return code,said

def states(plan, room): return {n:s.state for n,s in Board(plan, room/'state').look().items()}

def small(room, **kw):
    "A source, two that build on it at once, of which the second may fail, and one after each"
    src = stage(room/'src.ipynb', "note('src')", "data_hash=str(size)", size=1)
    work = stage(room/'work.ipynb', "note(who); time.sleep(nap)\nassert not bad, 'it is bad'", "model_sha256=f'{who}{like}{steps}'", who='', like='', steps=1, nap=0., bad=False)
    make = lambda n,**g: Task(n, work, dict(who=n)|g|kw.get(n, {}), model=n)
    return Plan('small', [Task('src', src, kw.get('src', {}), watch=(str(room/'films'),)), make('a', like=Out('src', 'data_hash'), nap=1.), make('b', like=Out('src', 'data_hash'), nap=1.), make('c', like=Out('a', 'model_sha256')), make('d', like=Out('b', 'model_sha256'))])

def test_order_parallel_once_cut_off_and_a_failure(tmp_path):
    films = tmp_path/'films'; films.mkdir(); (films/'x').write_text('1')
    bad = small(tmp_path, b=dict(bad=True))
    code,said = go(bad, tmp_path, 2)
    assert code==1 and any('b failed' in s and 'it is bad' in s for s in said) and 'd blocked: needs b, which failed' in said
    assert states(bad, tmp_path)==dict(src='done', a='done', b='failed', c='done', d='blocked')
    at = {n:Record.load(Board(bad, tmp_path/'state').read(n)['record']) for n in 'abc'}
    begun,end = {n:r['where']['at'] for n,r in at.items()},{n:r['where']['at']+r['seconds'] for n,r in at.items()}
    assert max(begun['a'], begun['b'])<min(end['a'], end['b']) and begun['c']>=end['a']-.2 and log(tmp_path)[0]=='src'
    # mended: what failed and what needs it, and nothing else; then nothing at all
    (tmp_path/'log').unlink(); good = small(tmp_path)
    assert go(good, tmp_path, 2)[0]==0 and log(tmp_path)==['b','d']
    assert go(good, tmp_path, 2)==(0, []) and log(tmp_path)==['b','d']
    # a touched film: looked at again, came out the same, so there it ends
    os.utime(films/'x', (1,1)); (tmp_path/'log').unlink()
    assert go(small(tmp_path), tmp_path, 2)[0]==0 and log(tmp_path)==['src']
    # all once more, as they are now; then a stage is edited: what it did counts, and is said to be of another day
    now = small(tmp_path); assert go(now, tmp_path, 2, again=tuple(now))[0]==0
    text = show(now, tmp_path/'state'); assert text.count('done ')==5 and 'other code' not in text
    work = tmp_path/'work.ipynb'; work.write_text(work.read_text()+' '); text = show(now, tmp_path/'state')
    assert text.count('done by other code than this')==4 and go(now, tmp_path, 2)==(0, [])
    assert len(plan_figure(small(tmp_path), Board(small(tmp_path), tmp_path/'state').look()).texts)==5

CHARGE = '''from deepfake_nb.budget import Ledger
if ledger: Ledger(ledger).charge(budget*3600/.39, purse, 'training', .39)
place = Path(grown_from or {home!r})/'more' if grown_from else Path({home!r})/'a'; place.mkdir(parents=True, exist_ok=True)
note(place.name)'''

def money_stages(room):
    "Stages that leave what the real ones leave; the trainings spend their budget, the evaluations read their AUC from a list"
    home = room/'checkpoints'; paid = dict(ledger='', purse='train', budget=2.5)
    return dict(prepare=stage(room/'prepare.ipynb', "note('prepare')", f"store={str(room)!r}, data_hash='d'", preset=''),
        phase_a=stage(room/'phase_a.ipynb', CHARGE.format(home=str(home)), "checkpoints=str(place), model_sha256=f'A{len(place.parts)}'", preset='', store='', grown_from='', **paid),
        evaluate=stage(room/'evaluate.ipynb', "k = Path(checkpoints).parts.count('more'); aucs = json.loads((Path(gate_videos)/'aucs').read_text()); auc = aucs[min(k, len(aucs)-1)]; note(f'gate{k}' if phase=='a' else 'last')",
            "auc=auc, gate='stop' if auc<.6 else 'phase_b' if auc>.7 else 'more_phase_a', checkpoints=checkpoints, model_sha256=checkpoints", preset='', phase='a', store='', checkpoints='', gate_videos=''),
        phase_b=stage(room/'phase_b.ipynb', "note('B '.strip())\nfrom deepfake_nb.budget import Ledger\nLedger(ledger).charge(budget*3600/.39, purse, 'B', .39)", "model_sha256='B'+checkpoints, grew=checkpoints", preset='', store='', checkpoints='', gate='', **paid))

def test_the_gate_s_three_words_and_a_reserve_that_ends(tmp_path):
    stages,gate = money_stages(tmp_path),tmp_path/'gate'; gate.mkdir(); board = lambda p: Board(p, tmp_path/'state')
    def five(*aucs): (gate/'aucs').write_text(json.dumps(aucs)); return five_dollar_plan(dict(preset='tiny', gate_videos=str(gate)), stages=stages)
    stop = five(.55); code,said = go(stop, tmp_path)
    assert code==0 and 'gate A says stop' in said and log(tmp_path)==['prepare','a','gate0']
    s = board(stop).look(); assert {s[n].state for n in stop if n not in ('prepare','phase A','gate A')}=={'skipped'} and s['phase B'].reason=='gate A says stop'
    # between: a prolongation and the gate again, as long as the reserve covers both, and the last evaluation. Somebody had used $1.80 of it
    (tmp_path/'log').unlink(); ledger = Ledger(tmp_path/'state'/'ledger.json'); ledger.charge(1.8*3600/.39, 'reserve', 'set-up', .39)
    more = five(.65, .66, .75); code,said = go(more, tmp_path)
    assert code==0 and log(tmp_path)==['gate0','more','gate1'] and states(more, tmp_path)['more 2']=='stopped'
    why, = [s for s in said if 'not begun' in s]; assert 'more 2 takes $0.50 and $0.50 must stay for gate 2, evaluate B' in why and "'reserve' has $0.7" in why
    assert states(more, tmp_path)['phase B']=='skipped' and states(more, tmp_path)['gate 3']=='skipped'
    ledger.read(); assert abs(ledger.spent('train')-2.5)<.01 and 2.3<ledger.spent('reserve')<2.35 # the evaluations took seconds, and were counted by the loop
    assert {r['label'] for r in ledger.table()}>={'prepare','gate A','gate 1','training'}
    # with more in the purse it goes on where it stopped, and Phase B grows out of the weights whose evaluation said so
    (tmp_path/'log').unlink(); ledger.put('reserve', 4.); code,said = go(more, tmp_path)
    assert code==0 and log(tmp_path)==['more','gate2','B','last'] and 'gate 2 says phase_b' in said
    kept = board(more).look()['phase B'].left; assert kept['grew'].endswith('a/more/more')
    assert states(more, tmp_path)['more 3']=='skipped' and go(more, tmp_path)==(0, [])
    ledger.read(); assert ledger.spent('train')==pytest.approx(5., abs=.01)
    assert '$5.00' in show(more, tmp_path/'state') and "in the purse 'train'" in show(more, tmp_path/'state')

def pair(room, nap=1.5, models='xy', steps=2):
    "Models of some steps each, on nothing; a person each"
    work = stage(room/'work.ipynb', "note(who+'+'); time.sleep(nap); note(who+'-')", "model_sha256=who+like", who='', like='', nap=nap)
    return Plan('pair', [Task(f'{m}{i}', work, dict(who=f'{m}{i}')|(dict(like=Out(f'{m}{i-1}', 'model_sha256')) if i>1 else {}), model=m, person='xy'.index(m)+1) for m in models for i in range(1, steps+1)])

def alone(lines, m):
    "Was a model ever trained twice at once?"
    on = 0
    for l in lines:
        if l[0]==m: on += 1 if l[-1]=='+' else -1
        if on not in (0,1): return False
    return True

def test_two_runners_share_the_work_and_never_a_model(tmp_path):
    plan = pair(tmp_path, .5)
    pids = [fork(lambda: go(plan, tmp_path)[0]) for _ in range(2)]
    assert [ended(p) for p in pids]==[0,0]
    lines = log(tmp_path); assert sorted(lines)==sorted(f'{m}{i}{s}' for m in 'xy' for i in (1,2) for s in '+-'), lines # each once
    assert alone(lines, 'x') and alone(lines, 'y')
    owners = [read_json(tmp_path/'state'/'tasks'/f'{n}.json')['pid'] for n in plan]; assert set(owners)==set(pids) # both had a part
    assert not list((tmp_path/'state'/'leases').glob('?'))

def begun(plan, room, n): return wait_for(lambda: (d := Board(plan, room/'state').read(n)).get('state')=='running' and d['record'] and f'{n}+' in log(room) and d)

def test_killed_runners(tmp_path, capsys):
    "kill -9 of the runner at any moment; the next one ends what was left at work and does the rest"
    n,seed = count(1),0; rng = random.Random(seed); good = 0
    for i in range(n):
        room = tmp_path/str(i); room.mkdir(); plan = pair(room, 1., 'x' if i==0 else 'xy')
        pid = fork(lambda: go(plan, room)[0])
        if i==0: orphan = begun(plan, room, 'x1')['record']
        else: time.sleep(rng.uniform(0, 8))
        os.kill(pid, signal.SIGKILL); assert ended(pid)==-9
        if i==0: assert _family(orphan) and states(plan, room)['x1']=='lost'
        code,said = go(plan, room)
        if i==0: assert 'x1: a runner' in said[0] and 'is done again' in said[0] and not _family(orphan) and log(room).count('x1+')==2 and log(room).count('x1-')==1
        again = sum(l[-1]=='+' for l in log(room))-len(plan)
        good += code==0 and set(states(plan, room).values())=={'done'} and 0<=again<=1
    with capsys.disabled(): print(); told(good, n, 'kill -9 of the runner: finished by the next', seed)

@pytest.mark.parametrize('sig', [signal.SIGTERM] if not os.environ.get('SOAK') else [signal.SIGTERM,signal.SIGINT])
def test_a_signal_ends_in_good_order(tmp_path, sig):
    plan = pair(tmp_path, 30.); pid = fork(lambda: go(plan, tmp_path)[0]); d = begun(plan, tmp_path, 'x1')
    os.kill(pid, sig); assert ended(pid)==128+sig
    assert states(plan, tmp_path)==dict(x1='ready', x2='waiting', y1='ready', y2='waiting') and not _family(d['record'])
    assert Record.load(d['record']).state=='interrupted' and not list((tmp_path/'state'/'leases').glob('?'))

def test_a_state_of_another_machine_is_believed_until_it_is_silent(tmp_path):
    plan = pair(tmp_path, 0.); board = Board(plan, tmp_path/'state'); s = board.look()['x1']
    rec = tmp_path/'runs'/'far'; rec.mkdir(parents=True); write_json(rec/'run.json', dict(status='running', pid=1, pid_started=0., host='another'))
    board.write('x1', key=s.key, state='running', reason='', record=str(rec), left={}, owner='person 1', host='another', pid=1)
    assert board.look()['x1'].state=='running' and 'works on' in board.look()['x1'].reason
    old = time.time()-700; os.utime(rec/'run.json', (old,old)); assert board.look()['x1'].state=='lost'
    board.write('x1', key='other', state='running', reason='', record='', left={}, owner='person 1', host='another', pid=1); assert board.look()['x1'].state=='lost' # of other parameters, and nobody holds the lease

def test_nothing_begins_where_what_it_works_on_is_not_there(tmp_path):
    (tmp_path/'films').mkdir(); plan = small(tmp_path); (tmp_path/'films').rmdir()
    with pytest.raises(PlanError, match='films is not there, and src works on it'): go(plan, tmp_path)
    assert not (tmp_path/'state'/'tasks').exists()

def test_what_a_stage_says_that_it_left_must_be_there(tmp_path):
    liar = stage(tmp_path/'liar.ipynb', "note('liar')", "store='/nowhere/at/all'", size=1)
    plan = Plan('liar', [Task('it', liar)]); code,said = go(plan, tmp_path)
    assert code==1 and log(tmp_path)==['liar'] and 'nowhere/at/all, and that is not there' in said[-1]

@pytest.mark.skipif('SOAK' not in os.environ, reason='starts a cluster: with SOAK')
def test_the_same_loop_on_a_cluster(tmp_path):
    "Each person's tasks on the machine that offers his resource; a process of its own, as Ray asks for"
    code = f"""import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_plan import *
from deepfake_nb.executors import RayExecutor
room = Path({str(tmp_path)!r}); plan = Plan('pair', [replace(t, resources={{f'person{{t.person}}':1}}) for t in pair(room, 1.).tasks])
with RayExecutor(room/'runs', num_cpus=2, resources=dict(person1=1, person2=1)) as ex: sys.exit(run(plan, ex, room/'state', tick=.5))"""
    assert subprocess.run([sys.executable,'-c',code]).returncode==0
    assert sorted(l for l in log(tmp_path) if l[-1]=='+')==['x1+','x2+','y1+','y2+'] and alone(log(tmp_path), 'x') and alone(log(tmp_path), 'y')
