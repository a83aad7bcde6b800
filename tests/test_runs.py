"Every ending a run can have (nbdev.md 2.2), with a small dummy notebook: what the record says, and that nothing outlives the run."
import json,os,signal,subprocess,sys,time
from pathlib import Path
import nbformat,pytest
from common import wait_for
from deepfake_nb.runs import Record,RunError,_family,compare,index,is_lost,run_stage,silence
from deepfake_nb.journal import METRICS_MIME

ROOT = Path(__file__).resolve().parents[1]
SCORES = f"display({{'{METRICS_MIME}':dict(name='final', auc=.5+.1*epochs)}}, raw=True)"
OOM = 'import os,signal,time; time.sleep(.5); os.kill(os.getpid(), signal.SIGKILL)'
SLEEP = 'import time; time.sleep(300)'
BEAT = "import os,pathlib; run = pathlib.Path(os.environ['DEEPFAKE_NB_RUN']); (run/'status.json').write_text('{}')\n"
# a training loop as `train` is one: it catches the signal, writes a large checkpoint, and ends (papermill alone would kill it after 3 s)
TRAIN = BEAT+"""import signal,time
def stop(n, _): time.sleep(6); (run/'checkpoint').write_text(signal.Signals(n).name); raise KeyboardInterrupt
for s in (signal.SIGINT,signal.SIGTERM): signal.signal(s, stop)
(run/'status.json').write_text('{"step": 1}')
time.sleep(300)"""
WORKERS = BEAT+"import subprocess,sys,time; subprocess.Popen([sys.executable,'-c','import time,signal; signal.signal(15, signal.SIG_IGN); time.sleep(300)'], start_new_session=True)\n"
RUNNER = """import signal,sys,json
if sys.argv[3]!='ignored': signal.signal(signal.SIGINT, signal.default_int_handler)
from deepfake_nb.runs import run_stage
r = run_stage(sys.argv[1], dict(epochs=2), runs=sys.argv[2], grace=float(sys.argv[4]))
sys.exit(r.exit_code)"""

@pytest.fixture
def make(tmp_path):
    def f(*cells, tags=('parameters',), head='epochs: int = 1  # passes\nname: str = "x"', name='dummy'):
        new = nbformat.v4.new_code_cell
        nb = nbformat.v4.new_notebook(cells=[new(head, metadata=dict(tags=list(tags))), *map(new, cells)])
        nb.metadata.kernelspec = dict(name='python3', display_name='python3', language='python')
        nbformat.write(nb, tmp_path/f'{name}.ipynb')
        return tmp_path/f'{name}.ipynb'
    return f

def papermill_says_success(rec):
    nb = nbformat.read(rec.folder/'executed.ipynb', 4)
    return nb.metadata.papermill.exception is None and {c.metadata.papermill.status for c in nb.cells}=={'completed'}

def runner(nb, runs, sigint='default', grace=20):
    "A runner in a process of its own, with SIGINT at its default, or ignored as in the background of a shell"
    sig = signal.SIG_IGN if sigint=='ignored' else signal.SIG_DFL
    p = subprocess.Popen([sys.executable,'-c',RUNNER,nb,runs,sigint,str(grace)], cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGINT, sig), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder = wait_for(lambda: p.poll() is not None or [f.parent for f in Path(runs).glob('*/status.json')])
    assert p.poll() is None, p.stderr.read().decode()
    wait_for(lambda: (folder[0]/'status.json').read_text() != '')
    time.sleep(.5)
    return p,folder[0]

def ended(rec, status, *words):
    assert rec['status']==rec.state==status, rec.data
    for w in words: assert w in rec['reason'], rec['reason']
    assert Record.load(rec.folder).data==json.loads((rec.folder/'run.json').read_text())
    assert rec['ended'] and rec['seconds']>0 and _family(rec.folder)==[]
    assert not list(rec.folder.glob('*.part')) and not list(rec.folder.glob('*.tmp'))

def test_success(make, tmp_path):
    rec = run_stage(make('epochs', SCORES), dict(epochs=3), runs=tmp_path/'r', price=.39)
    ended(rec, 'succeeded')
    assert rec.exit_code==0 and rec.metrics['final']['auc']==pytest.approx(.8)
    assert json.loads((rec.folder/'metrics.json').read_text())==rec.metrics
    assert rec['parameters']==dict(epochs=3, name='x') and rec['given']==['epochs'] and rec['cost']==pytest.approx(rec['seconds']/3600*.39, abs=2e-4)
    assert rec.check() is rec
    text = (rec.folder/'run.json').read_text()+(rec.folder/'environment.txt').read_text()
    assert os.uname().nodename not in rec.data.values() and '://' not in text and str(Path(sys.prefix)) not in text

def test_exception(make, tmp_path):
    rec = run_stage(make('1/0', SCORES), runs=tmp_path/'r')
    ended(rec, 'failed', 'ZeroDivisionError: division by zero')
    assert rec['exit']==1 and rec.exit_code==1 and not rec.facts.all_ran
    with pytest.raises(RunError, match='ZeroDivisionError'): rec.check()

def test_timeout(make, tmp_path):
    rec = run_stage(make(TRAIN, SCORES), runs=tmp_path/'r', timeout=12, grace=30)
    ended(rec, 'timeout', 'longer than 12 s'); assert rec.exit_code==124 and (rec.folder/'checkpoint').exists()

def test_kernel_killed_in_the_middle(make, tmp_path):
    rec = run_stage(make(OOM, SCORES), runs=tmp_path/'r')
    ended(rec, 'killed', 'kernel died'); assert papermill_says_success(rec) and rec.exit_code==137

def test_kernel_killed_in_the_last_cell(make, tmp_path):
    rec = run_stage(make('epochs', SCORES+'\n'+OOM), runs=tmp_path/'r')
    ended(rec, 'killed', 'kernel died')
    assert papermill_says_success(rec) and rec.facts[:4]==(False,True,True,True)

def test_missing_metrics(make, tmp_path):
    nb = make('epochs')
    ended(run_stage(nb, runs=tmp_path/'r'), 'failed', 'shows no metrics')
    ended(run_stage(make('epochs', 'from deepfake_nb.runs import emit_done; emit_done()'), runs=tmp_path/'r', need_metrics=False, env=dict(PYTHONPATH=str(ROOT))), 'succeeded')

def test_metrics_that_contradict(make, tmp_path):
    two = [f"display({{'{METRICS_MIME}':dict(name='{n}', data_hash='{h}')}}, raw=True)" for n,h in [('a','1'),('b','2')]]
    ended(run_stage(make(*two), runs=tmp_path/'r'), 'failed', 'different data: 1, 2')

def test_unknown_parameter_and_wrong_type(make, tmp_path):
    nb = make(SCORES)
    with pytest.raises(RunError, match='no parameter `epoch`. Nearest: epochs'): run_stage(nb, dict(epoch=3), runs=tmp_path/'r')
    with pytest.raises(RunError, match="declared as int, got '3'"): run_stage(nb, dict(epochs='3'), runs=tmp_path/'r')
    assert not (tmp_path/'r').exists()

def test_missing_parameters_tag(make, tmp_path):
    with pytest.raises(RunError, match='0 cells are tagged `parameters`'): run_stage(make(SCORES, tags=()), runs=tmp_path/'r')
    assert not (tmp_path/'r').exists()

@pytest.mark.parametrize('sigint', ['default','ignored'])
def test_ctrl_c(make, tmp_path, sigint):
    p,folder = runner(make(TRAIN, SCORES), tmp_path/'r', sigint)
    p.send_signal(signal.SIGINT)
    assert p.wait(60)==130
    rec = Record.load(folder)
    ended(rec, 'interrupted', 'SIGINT to the runner')
    assert (folder/'checkpoint').read_text()=='SIGINT'

def test_sigterm(make, tmp_path):
    p,folder = runner(make(TRAIN, SCORES), tmp_path/'r')
    p.send_signal(signal.SIGTERM)
    assert p.wait(60)==143
    ended(Record.load(folder), 'interrupted', 'SIGTERM to the runner')
    assert (folder/'checkpoint').read_text()=='SIGTERM'

def test_second_ctrl_c_does_not_wait(make, tmp_path):
    deaf = BEAT+"import time\nwhile True:\n    try: time.sleep(300)\n    except KeyboardInterrupt: (run/'heard').touch()"
    p,folder = runner(make(deaf, SCORES), tmp_path/'r', grace=300)
    p.send_signal(signal.SIGINT); wait_for((folder/'heard').exists); start = time.monotonic()
    p.send_signal(signal.SIGINT)
    assert p.wait(60)==130 and time.monotonic()-start<30
    ended(Record.load(folder), 'interrupted')

def test_kernel_that_hears_no_signal_is_ended_by_force(make, tmp_path):
    deaf = "import signal,time\nfor s in (2,15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(300)"
    ended(run_stage(make(deaf, SCORES), runs=tmp_path/'r', timeout=4, grace=1), 'timeout')

def test_workers_do_not_outlive_the_run(make, tmp_path):
    rec = run_stage(make(WORKERS, SCORES), dict(epochs=1), runs=tmp_path/'r', grace=1)
    ended(rec, 'succeeded')

def test_papermill_killed(make, tmp_path):
    p,folder = runner(make(BEAT+SLEEP, SCORES), tmp_path/'r', grace=2)
    papermill = [q for q in _family(folder) if q.ppid()==p.pid]
    assert len(papermill)==1; papermill[0].kill()
    assert p.wait(60)==137
    ended(Record.load(folder), 'killed', 'papermill was ended by SIGKILL')

def test_hanging_kernel_under_a_living_runner(make, tmp_path):
    "The heartbeat goes stale although the runner lives; the reader says lost beyond the limit"
    p,folder = runner(make(BEAT+SLEEP, SCORES), tmp_path/'r', grace=2)
    first = silence(folder); time.sleep(2.5)
    assert silence(folder) >= first+2 and Record.load(folder).state=='running' # a parent that beat would keep it young
    old = time.time()-300
    for f in folder.iterdir(): os.utime(f, (old,old))
    assert Record.load(folder).state=='running' # stale, but the runner is there: a slow step
    for f in folder.iterdir(): os.utime(f, (old-400,)*2)
    assert Record.load(folder).state=='lost' and p.poll() is None
    p.send_signal(signal.SIGTERM); p.wait(60)
    ended(Record.load(folder), 'interrupted')

def test_hang_limit_stops_the_run(make, tmp_path):
    ended(run_stage(make(SLEEP, SCORES), runs=tmp_path/'r', hang=4, grace=5), 'timeout', 'no sign of life for 4 s')

def test_runner_killed_is_lost(make, tmp_path):
    p,folder = runner(make(BEAT+SLEEP, SCORES), tmp_path/'r')
    p.kill(); p.wait()
    try:
        assert Record.load(folder).state=='running' # the kernel has just beaten
        old = time.time()-200
        for f in folder.iterdir(): os.utime(f, (old,old))
        assert Record.load(folder).state=='lost' and Record.load(folder)['status']=='running'
        assert index(tmp_path/'r').state.tolist()==['lost']
    finally:
        for q in _family(folder): q.kill()

def test_lost_rule_is_exact():
    assert [is_lost(a, alive) for alive in (True,None,False) for a in (120,121,600,601)]==[False,False,False,True]*2+[False,True,True,True]

def test_dirty_tree_is_recorded(make, tmp_path):
    git = lambda *a: subprocess.run(['git','-C',tmp_path,'-c','user.name=n','-c','user.email=e','-c','commit.gpgsign=false',*a], check=True, capture_output=True)
    nb = make('epochs', SCORES); (tmp_path/'.gitignore').write_text('r/\n'); (tmp_path/'a.py').write_text('x = 1\n')
    git('init','-q'); git('add','.'); git('commit','-qm','one')
    a = run_stage(nb, runs=tmp_path/'r')
    (tmp_path/'a.py').write_text('x = 2\n')
    b = run_stage(nb, dict(epochs=2), runs=tmp_path/'r')
    assert (a['git']['dirty'],b['git']['dirty'])==(False,True) and not (a.folder/'diff.patch').exists()
    assert '+x = 2' in (b.folder/'diff.patch').read_text() and b['git']['sha'][:7] in b.folder.name
    d = compare(a, b)
    assert set(zip(d.kind, d.name))-{('code','package')}=={('parameter','epochs'),('metric','final.auc'),('code','dirty')}
    assert index(tmp_path/'r')['final.auc'].round(2).tolist()==[.6,.7]

def test_plain_papermill_works_too(make, tmp_path):
    r = subprocess.run([sys.executable,'-m','papermill',make('epochs', SCORES),tmp_path/'out.ipynb','-p','epochs','4','--no-progress-bar'], capture_output=True)
    assert r.returncode==0, r.stderr.decode()
    last = nbformat.read(tmp_path/'out.ipynb', 4).cells[-1]
    assert last.outputs[0].data[METRICS_MIME]['auc']==pytest.approx(.9)
