"Executors where processes and machines are lost: signals to a plan, workers and nodes of a real cluster of three, and what outlives them"
import importlib.util,json,os,shlex,signal,subprocess,sys,time
from pathlib import Path
os.environ['RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'] = '0' # before Ray is loaded: it keeps to 127.0.0.1
import nbformat,psutil,pytest,yaml
from common import wait_for
from deepfake_nb.executors import Call,LocalExecutor,RayExecutor,skypilot_yaml
from deepfake_nb.journal import METRICS_MIME
from deepfake_nb.plan import parser
from deepfake_nb.runs import Record,RunError,_family,index

ROOT = Path(__file__).resolve().parents[1]
needs_ray = pytest.mark.skipif(not importlib.util.find_spec('ray'), reason='Ray is not installed: pip install "deepfake_nb[ray]"')
METRICS = f"display({{'{METRICS_MIME}':dict(name='final', auc=.8)}}, raw=True)"
BEAT = "import os,pathlib,time; run = pathlib.Path(os.environ['DEEPFAKE_NB_RUN']); (run/'status.json').write_text('{\"step\": 1}')\n"
# as `train` is: its checkpoints lie below DEEPFAKE_NB_HOME; it goes on from the last one, and writes one when it is stopped
TRAIN = BEAT+"""home = pathlib.Path(os.environ['DEEPFAKE_NB_HOME']); home.mkdir(exist_ok=True); mark = home/name; steps = int(mark.read_text()) if mark.exists() else 0
begun = steps
try:
    while steps<4: time.sleep(seconds/4); steps += 1; mark.write_text(str(steps))
except KeyboardInterrupt: (run/'stopped').write_text(str(steps)); raise"""
HEAD = 'name: str = "x"\nseconds: float = 1.'

@pytest.fixture(scope='module')
def make(tmp_path_factory):
    "Notebooks, all in one folder"
    folder = tmp_path_factory.mktemp('stages')
    def f(name, *cells):
        new = nbformat.v4.new_code_cell
        nb = nbformat.v4.new_notebook(cells=[new(HEAD, metadata=dict(tags=['parameters'])), *map(new, cells), new(METRICS)])
        nb.metadata.kernelspec = dict(name='python3', display_name='python3', language='python')
        nbformat.write(nb, folder/f'{name}.ipynb')
        return str(folder/f'{name}.ipynb')
    return f

def shown(rec): return nbformat.read(rec.folder/'executed.ipynb', 4).cells[-2].outputs[0].data['text/plain']
def marked(pid): return [p for p in psutil.process_iter(['environ']) if (p.info['environ'] or {}).get('DEEPFAKE_NB_WORKER', '').startswith(f'{pid}-') and p.status()!=psutil.STATUS_ZOMBIE]
def records(runs): return [Record.load(f) for f in Path(runs).iterdir() if f.is_dir()]

# --- this machine

PLAN = """import json,signal,sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from deepfake_nb.executors import Call,LocalExecutor
with LocalExecutor(sys.argv[2], slots=2, devices=[]) as ex:
    for n in 'abc': ex.submit(Call(n, sys.argv[1], dict(name=n, seconds=200.)))
    ends = {d.call.name: d.record['status'] if d.record else d.error for d in ex.drain()}
print(json.dumps(ends)); sys.exit(7)"""

def plan(make, tmp_path):
    env = {**os.environ, 'DEEPFAKE_NB_HOME':str(tmp_path/'home')}
    p = subprocess.Popen([sys.executable,'-c',PLAN,make('train', TRAIN),tmp_path/'runs'], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: p.poll() is not None or len(list((tmp_path/'runs').glob('*/status.json')))==2); assert p.poll() is None
    return p

def test_one_signal_stops_all_runs(make, tmp_path):
    "Each run writes its checkpoint, what waits never begins, the plan goes on to its own end, and nothing outlives it"
    p = plan(make, tmp_path); time.sleep(.5)
    p.send_signal(signal.SIGINT); out,_ = p.communicate(timeout=60)
    assert (json.loads(out), p.returncode)==(dict(a='interrupted', b='interrupted', c='SIGINT before it began'), 7)
    recs = records(tmp_path/'runs')
    assert [r['stopped_by'] for r in recs]==['SIGINT']*2 and [_family(r.folder) for r in recs]==[[],[]]
    assert all((r.folder/'stopped').exists() for r in recs)

def test_a_signal_that_stopped_nothing_is_sent_again(tmp_path):
    code = "import os,signal,sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom deepfake_nb.executors import LocalExecutor\n" \
           "try:\n    with LocalExecutor(sys.argv[1]) as ex: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: sys.exit(42)"
    assert subprocess.run([sys.executable,'-c',code,tmp_path], cwd=ROOT).returncode==42

def test_an_error_in_the_plan_leaves_nothing_behind(make, tmp_path, monkeypatch):
    monkeypatch.setenv('DEEPFAKE_NB_HOME', str(tmp_path/'home'))
    with pytest.raises(ZeroDivisionError), LocalExecutor(tmp_path/'runs', devices=[]) as ex:
        ex.submit(Call('a', make('train', TRAIN), dict(seconds=200.)))
        wait_for(lambda: list((tmp_path/'runs').glob('*/status.json'))); 1/0
    rec, = records(tmp_path/'runs')
    assert rec['status']=='interrupted' and _family(rec.folder)==[]

def test_without_ray_it_says_what_to_install():
    code = "import sys; sys.modules['ray'] = None\nfrom deepfake_nb.executors import RayExecutor\nRayExecutor()"
    r = subprocess.run([sys.executable,'-c',code], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode==1 and 'RunError: Ray is not installed: pip install "deepfake_nb[ray]"' in r.stderr

# --- three machines, of one core each

@pytest.fixture(scope='module')
def cluster():
    small = dict(num_cpus=1, object_store_memory=80*2**20)
    os.environ.update(RAY_USAGE_STATS_ENABLED='0', RAY_AUTH_MODE='token', RAY_AUTH_TOKEN='a'*64) # before Ray is loaded
    from ray.cluster_utils import Cluster
    c = Cluster(initialize_head=True, head_node_args=dict(small, resources=dict(head=1), include_dashboard=False, _system_config=dict(health_check_initial_delay_ms=0, health_check_period_ms=500, health_check_failure_threshold=2)))
    c.b,c.w = c.add_node(**small, resources=dict(b=1, train=1)),c.add_node(**small, resources=dict(w=1, train=1))
    yield c
    c.shutdown()

@pytest.fixture(scope='module')
def ex(cluster, tmp_path_factory):
    os.environ['DEEPFAKE_NB_HOME'],before = str(tmp_path_factory.mktemp('home')),os.environ.get('DEEPFAKE_NB_HOME')
    try:
        with RayExecutor(tmp_path_factory.mktemp('ray')/'runs', address=cluster.address) as e: yield e
    finally: os.environ.pop('DEEPFAKE_NB_HOME') if before is None else os.environ.update(DEEPFAKE_NB_HOME=before)

def node(n): return n.node_id[:6]

@needs_ray
def test_siblings_of_a_failure_finish_and_resources_are_kept(make, cluster, ex):
    boom,quick = make('boom', '1/0'),make('quick', TRAIN, "display(os.environ['CUDA_VISIBLE_DEVICES'])")
    for c in [Call('fails', boom), Call('on b', quick, dict(name='b'), resources=dict(b=1)), Call('on head', quick, dict(name='h'), resources=dict(head=1))]: ex.submit(c)
    with pytest.raises(RunError, match='on tape: no machine of the cluster has 1 CPU, 1 tape; there are: 1 CPU, 1 b, 1 train; 1 CPU, 1 head; 1 CPU, 1 train, 1 w'): ex.submit(Call('on tape', quick, resources=dict(tape=1)))
    with pytest.raises(RunError, match='2 CPU; there are'): ex.submit(Call('wide', quick, cpus=2))
    done = {d.call.name:d for d in ex.drain()}
    assert {n:d.record['status'] for n,d in done.items()}=={'fails':'failed', 'on b':'succeeded', 'on head':'succeeded'}
    assert 'ZeroDivisionError' in done['fails'].record['reason'] and [r['stage'] for r in records(ex.runs)].count('boom')==1
    assert done['on b'].record['where']['node']==node(cluster.b) and done['on head'].record['where']['node']==node(cluster.head_node)
    assert shown(done['on b'].record)=="''" # no card was asked for, none is seen
    assert set(index(ex.runs).state)=={'failed','succeeded'} and not ex.running()

@needs_ray
def test_only_this_machine_can_reach_it_and_who_has_the_token(cluster, ex):
    heard = [a for p in psutil.process_iter(['cmdline']) if any('ray' in w for w in p.info['cmdline'] or []) for a in p.net_connections() if a.status=='LISTEN']
    assert len(heard)>6 and {a.laddr.ip.removeprefix('::ffff:') for a in heard}=={'127.0.0.1'}
    code = f"import ray; ray.init(address='{cluster.address}', log_to_driver=False)"
    env = {k:v for k,v in os.environ.items() if not k.startswith('RAY_AUTH')}|dict(RAY_AUTH_MODE='disabled', RAY_NUM_REDIS_GET_RETRIES='2') # tries, to be told soon
    stranger = subprocess.run([sys.executable,'-c',code], env=env, capture_output=True, text=True)
    assert stranger.returncode and 'Unauthenticated' in stranger.stderr

@needs_ray
def test_stop_leaves_records_and_no_orphans(make, ex):
    train = make('train', TRAIN)
    for n in ('s1','s2','s3','s4'): ex.submit(Call(n, train, dict(name=n, seconds=200.)))
    def at_work(): return [f for f in ex.running().values() if (f/'status.json').exists()]
    folders = wait_for(lambda: len(f := at_work())==3 and f)
    pids = [Record.load(f)['pid'] for f in folders]
    assert {Record.load(f).state for f in folders}=={'running'} and all(marked(p) for p in pids)
    ex.stop(); done = list(ex.drain()); ex.got.clear(); ex.told = 0 # the next test takes the same cluster
    assert sorted(d.record['status'] if d.record else d.error for d in done)==['SIGINT before it began']+['interrupted']*3
    assert all((d.record.folder/'stopped').exists() for d in done if d.record)
    assert not any(marked(p) for p in pids)

@needs_ray
def test_driver_and_worker_that_are_killed_take_the_run_along(make, cluster, tmp_path):
    "Nobody is left who could end the kernel, but the guard"
    code = "import sys; from deepfake_nb.executors import *\nwith RayExecutor(sys.argv[2], address=sys.argv[3]) as ex:\n" \
           "    ex.submit(Call('a', sys.argv[1], dict(name='a', seconds=200.)))\n    while True: ex.wait(.2); ex.running()"
    p = subprocess.Popen([sys.executable,'-c',code,make('train', TRAIN),tmp_path/'runs',cluster.address], cwd=ROOT, env={**os.environ, 'DEEPFAKE_NB_HOME':str(tmp_path/'home')})
    folder = wait_for(lambda: list((tmp_path/'runs').glob('*/status.json')))[0].parent
    pid = Record.load(folder)['pid']; assert marked(pid)
    p.kill(); os.kill(pid, signal.SIGKILL); p.wait()
    wait_for(lambda: not marked(pid), 30)

@needs_ray
def test_what_is_lost_too_often_is_given_up(make, ex):
    "Ray tries for ever what its memory guard has ended; the driver counts"
    ex.submit(Call('heavy', make('train', TRAIN), dict(name='heavy', seconds=200.))); ex.retries,allowed = 0,ex.retries
    os.kill(Record.load(wait_for(lambda: ex.running().get('heavy')))['pid'], signal.SIGKILL)
    d, = ex.drain(); ex.retries = allowed
    assert (d.record,d.error)==(None,'lost 1 times') and [r['reason'] for r in records(ex.runs) if r['where']['call']=='heavy'].count('its worker or its machine was lost')==1

@needs_ray
def test_a_lost_machine_is_survived(make, cluster, ex):
    "One machine of three dies without a word, and a worker of another is told to go, both in the middle of a run"
    train = make('train', TRAIN, 'display(begun)')
    ex.submit(Call('busy', train, dict(name='busy', seconds=4.), resources=dict(b=1))); wait_for(lambda: 'busy' in ex.running())
    ex.submit(Call('long', train, dict(name='long', seconds=8.), resources=dict(train=1))) # `b` is taken, so it goes to `w`
    home = Path(os.environ['DEEPFAKE_NB_HOME']); wait_for(lambda: 'long' in ex.running() and (home/'long').exists())
    first = Record.load(ex.running()['long']); assert first['where']['node']==node(cluster.w) and first.state=='running'
    os.kill(Record.load(ex.running()['busy'])['pid'], signal.SIGTERM)
    cluster.remove_node(cluster.w, allow_graceful=False)
    done = {d.call.name:d for d in ex.drain()}
    long = done['long'].record
    assert {n:d.record['status'] for n,d in done.items()}==dict(busy='succeeded', long='succeeded')
    assert long['where']['node']==node(cluster.b) and int(shown(long))>=1 # from the checkpoint of the lost one
    assert (Record.load(first.folder)['status'],Record.load(first.folder)['reason'])==('killed','its worker or its machine was lost')
    assert sorted(r['status'] for r in records(ex.runs) if r['where']['call'] in done)==['killed']*2+['succeeded']*2 and not ex.running()
    assert not marked(first['pid'])
    def refused():
        try: ex.submit(Call('gone', train, resources=dict(w=1)))
        except RunError as e: return str(e)
        ex.ray.cancel(next(iter(ex.refs))); list(ex.drain())
    assert 'no machine of the cluster has 1 CPU, 1 w' in wait_for(refused, 30)

# --- a machine by the hour

ARGS = ['run','five_dollars','-p','videos=/workspace/videos','-p','gate_videos=/workspace/gate','-p','weights=/workspace/convnextv2_base.safetensors','-p','gpu=RTX 4090']

def test_the_committed_task_is_what_is_generated():
    "And the plan understands the words that are in it"
    text = (ROOT/'runpod'/'plan.sky.yaml').read_text()
    assert text==skypilot_yaml(ARGS, volume='deepfake-nb')
    words = shlex.split(yaml.safe_load(text)['run'].splitlines()[-1])
    assert words[:3]==['python','-m','deepfake_nb.plan'] and parser().parse_args(words[3:]).plan=='five_dollars'

def test_skypilot_accepts_the_task():
    "Their schema, where SkyPilot is installed; ours is asked by `skypilot_yaml` itself"
    schemas = pytest.importorskip('sky.utils.schemas'); import jsonschema
    task = yaml.safe_load((ROOT/'runpod'/'plan.sky.yaml').read_text())
    jsonschema.validate(task, schemas.get_task_schema()); jsonschema.validate(task['resources'], schemas.get_resources_schema())
