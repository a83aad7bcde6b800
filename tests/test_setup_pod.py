"runpod/setup_pod.sh: the dry run shows everything and touches nothing; the real run, against stand-ins for python and runpodctl, keeps its promises."
import os,re,shutil,subprocess,time
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT/'runpod'/'setup_pod.sh'
# A stand-in for python: notes its arguments, answers the questions of the script, makes a "virtual environment" of itself.
PYTHON = r'''#!/bin/bash
printf '%s|' "$@" | tr '\n' ' ' >> "$STUB_LOG"; echo >> "$STUB_LOG"
case "$*" in
  *'"none"'*) if [ -f "$STUB_LOG.torch" ]; then cat "$STUB_LOG.torch"; else echo "$STUB_TORCH"; fi ;;
  *'u.find_spec(n)'*) echo "torch==$(if [ -f "$STUB_LOG.torch" ]; then cat "$STUB_LOG.torch"; else echo "$STUB_TORCH"; fi)" ;;
  *'cuda.is_available'*'sys.argv'*) ;;
  *'cuda.is_available'*) exit "${NO_GPU:-0}" ;;
  *'-m venv'*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
  *'-m uv'*) echo 2.14.1 > "$STUB_LOG.torch" ;;
esac
'''
# A stand-in for runpodctl: fails twice, then stops the pod.
RUNPODCTL = r'''#!/bin/bash
echo "$*" >> "$STUB_LOG.ctl"
[ "$(wc -l < "$STUB_LOG.ctl")" -gt 2 ]
'''

@pytest.fixture
def pod(tmp_path):
    "A function that calls the script in a small world of its own"
    bin,ctl = tmp_path/'bin',tmp_path/'ctl'
    for d in (bin,ctl,tmp_path/'vol'): d.mkdir()
    for f,text in [(bin/'python3',PYTHON),(ctl/'runpodctl',RUNPODCTL)]: f.write_text(text); f.chmod(0o755)
    env = {k:v for k,v in os.environ.items() if not k.startswith(('RUNPOD_','DEEPFAKE_NB'))}
    env |= dict(PATH=f'{bin}:{os.environ["PATH"]}', STUB_LOG=str(tmp_path/'log'), STUB_TORCH='2.12.0+cu130',
                DEEPFAKE_NB_DEADLINE_FILE=str(tmp_path/'deadline'), DEEPFAKE_NB_DEADLINE_RETRY='0.2')
    def call(*args, ctl_there=None, **more):
        there = 'RUNPOD_POD_ID' in more if ctl_there is None else ctl_there
        path = f'{ctl}:{env["PATH"]}' if there else env['PATH']
        return subprocess.run([SCRIPT,'--volume',tmp_path/'vol',*args], env=env|dict(PATH=path)|more, capture_output=True, text=True, timeout=60)
    call.log = lambda: (tmp_path/'log').read_text().splitlines() if (tmp_path/'log').exists() else []
    call.path = tmp_path
    yield call
    if (tmp_path/'deadline').exists(): end(int((tmp_path/'deadline').read_text().split()[2]))

def end(pid):
    "Kill a deadline, which hears no other signal and goes on asking after it was heard"
    if (f := Path(f'/proc/{pid}/cmdline')).exists() and b'deepfake_nb-deadline' in f.read_bytes(): os.killpg(pid, 9)

def state(folder): return {p.relative_to(folder).as_posix():p.stat().st_mtime_ns for p in sorted(folder.rglob('*')) if p.name!='log'}
def commands(r): return [l for l in r.stdout.splitlines() if l.startswith('+')]

def test_syntax():
    for f in (scripts := sorted(SCRIPT.parent.glob('*.sh'))): assert subprocess.run(['bash','-n',f]).returncode==0 and os.access(f, os.X_OK)==(f.name not in ('deadline.sh','lib.sh'))
    assert len(scripts)==5 and not re.search(r'2>/dev/null\s*\|\|', SCRIPT.read_text())
    if shutil.which('shellcheck'): subprocess.run(['shellcheck',*scripts], check=True)

def test_dry_run_prints_the_plan_and_touches_nothing(pod):
    before = state(pod.path)
    a,b = pod('--dry-run', RUNPOD_POD_ID='p1'),pod('--dry-run', RUNPOD_POD_ID='p1')
    assert a.returncode==0, a.stderr
    assert a.stdout==b.stdout and state(pod.path)==before # no times, no clock
    asked = [l for l in pod.log() if '"none"' not in l]
    assert asked==[] # python was only asked for its torch
    plan = commands(a)
    assert 'runpodctl pod stop' in plan[0] and plan[0].startswith('+ setsid nohup bash -c') # the deadline comes first
    for words in ['-m venv --system-site-packages','-c constraints.txt','torch.lock','env.sh']: assert any(words in c for c in plan), words
    assert any(c.endswith("-e '.[remote]' jupyterlab") for c in plan) and plan[-1].endswith('guard cache')
    assert any(c.endswith("-e '.[dev]'") for c in commands(pod('--dry-run', '--dev')))

def test_a_pods_torch_stays(pod):
    for v in ['2.10.0','2.12.0+cu130','2.14.1','3.0.0a1']:
        r = pod('--dry-run', STUB_TORCH=v)
        assert f'torch {v} is here and stays' in r.stdout and 'uv' not in r.stdout, r.stdout
    for v in ['none','2.9.1+cu128','2.2.0','1.13.1']: # 2.9 < 2.10: versions are no decimals
        plan = commands(pod('--dry-run', STUB_TORCH=v))
        assert any('--torch-backend=auto -r constraints-torch.txt' in c for c in plan), v
        assert any(c.endswith('install uv==0.13.8') for c in plan)

def test_a_torch_that_cannot_use_the_gpu_does_not_stay(pod):
    r = pod('--off-volume', '--no-deadline', RUNPOD_POD_ID='p1', NO_GPU='1'); assert "cannot use this pod's GPU" in r.stdout and any('|uv|' in l for l in pod.log())
    assert 'is here and stays' in pod('--off-volume', '--no-deadline', RUNPOD_POD_ID='p1').stdout

def test_two_set_ups_do_not_mix(pod):
    lock = pod.path/'vol'/'deepfake_nb'/'pod'/'setup.lock'; lock.parent.mkdir(parents=True)
    with subprocess.Popen(['flock',lock,'sleep','60'], start_new_session=True) as other:
        try: time.sleep(.3); r = pod('--off-volume', '--minutes', '.03'); assert r.returncode==1 and "the step 'environment' was not done" in r.stderr and not any('-m|pip' in l for l in pod.log())
        finally: os.killpg(other.pid, 9)
    assert pod('--off-volume').returncode==0

def test_every_install_is_pinned(pod):
    plan = [c for c in commands(pod('--dry-run', '--cuda-extra', STUB_TORCH='none')) if ' install ' in c]
    assert len(plan)==6
    for c in plan: assert '-c constraints.txt' in c or '-r constraints-torch.txt' in c or '==' in c, c
    assert not any('>' in c for c in plan) # an unquoted > would write a file

@pytest.mark.parametrize('args', [['--frobnicate'],['--hours'],['--hours','soon'],['now'],['--price','1;ls']])
def test_unknown_flags_are_refused(pod, args):
    before = state(pod.path); r = pod(*args)
    assert r.returncode==1 and r.stderr.startswith('setup_pod: ') and r.stdout=='' and state(pod.path)==before

def test_home_must_be_on_the_volume(pod):
    for home in ['/srv/x',f'{pod.path}/volume2/x',f'{pod.path}/vol/../x']:
        r = pod('--dry-run', DEEPFAKE_NB_HOME=home)
        assert r.returncode==1 and 'is not on the volume' in r.stderr, home
        assert pod('--dry-run', '--off-volume', DEEPFAKE_NB_HOME=home).returncode==0

def test_a_folder_on_the_containers_disk_is_no_volume(pod):
    if os.stat(pod.path).st_dev!=os.stat('/').st_dev: pytest.skip('the temporary folder is on a disk of its own')
    r = pod()
    assert r.returncode==1 and "lies on the container's disk" in r.stderr and not (pod.path/'vol'/'deepfake_nb').exists()

def test_real_run_twice(pod):
    r = pod('--off-volume'); assert r.returncode==0, r.stderr+r.stdout
    home = pod.path/'vol'/'deepfake_nb'
    assert (home/'torch.lock').read_text()=='torch==2.12.0+cu130\n' and f'DEEPFAKE_NB_HOME={home}' in (home/'env.sh').read_text()
    first = pod.log(); before = (home/'env.sh').read_text()
    r = pod('--off-volume'); assert r.returncode==0, r.stderr
    again = pod.log()[len(first):]
    assert any('-m|venv' in l for l in first) and not any('-m|venv' in l for l in again)
    assert (home/'env.sh').read_text()==before and not list(home.glob('*.part'))
    assert not any('|uv|' in l for l in pod.log())

def test_missing_torch_is_installed_once(pod):
    assert pod('--off-volume', STUB_TORCH='none').returncode==0
    n = sum('-m|uv' in l for l in pod.log())
    assert pod('--off-volume', STUB_TORCH='none').returncode==0
    assert (n,sum('-m|uv' in l for l in pod.log()))==(1,1)

def test_a_failing_step_stops_the_script(pod):
    stub = pod.path/'bin'/'python3'; stub.write_text(stub.read_text().replace("  *'-m uv'*)", "  *'-m pip'*) echo no route >&2; exit 7 ;;\n  *'-m uv'*)"))
    r = pod('--off-volume')
    assert r.returncode==7 and 'no route' in r.stderr and "the step 'install the rest' failed (exit 7)" in r.stderr and 'ready' not in r.stdout and not (pod.path/'vol'/'deepfake_nb'/'env.sh').exists()

def test_each_step_is_timed_and_weights_are_checked(pod):
    r = pod('--off-volume', '--weights', '/w/a.safetensors#12', '--weights', 's3://b/c.safetensors'); assert r.returncode==0, r.stderr
    steps = re.findall(r'^# +\d+ s  (.+)$', r.stdout, re.M); assert steps==['volume','python and torch: what is there','environment','install the rest','proof: imports and GPU','weights and sample pack']
    assert any(l.endswith('guard|cache|/w/a.safetensors#12|s3://b/c.safetensors|') for l in pod.log())

def test_a_step_that_hangs_is_ended_with_all_that_it_started(pod):
    stub = pod.path/'bin'/'python3'; stub.write_text(stub.read_text().replace("  *'-m uv'*)", "  *'-m pip'*) sleep 300 & echo $! > \"$STUB_LOG.pid\"; wait ;;\n  *'-m uv'*)"))
    start = time.monotonic(); r = pod('--off-volume', '--minutes', '.02')
    assert r.returncode==1 and time.monotonic()-start<10 and "the step 'install the rest' was not done after .02 minutes" in r.stderr
    assert re.search(r'^# +\d+ s  environment$', r.stderr, re.M) and 'ready' not in r.stdout and not os.path.exists(f"/proc/{(pod.path/'log.pid').read_text().strip()}/cwd")

def test_deadline_retries_until_the_pod_stops(pod):
    r = pod('--off-volume', '--hours', '0.0003', RUNPOD_POD_ID='p1'); assert r.returncode==0, r.stderr
    end = time.monotonic()+20; ctl = pod.path/'log.ctl'
    while not (ctl.exists() and len(ctl.read_text().splitlines())>=3) and time.monotonic()<end: time.sleep(.1)
    time.sleep(1)
    assert ctl.read_text().splitlines()==['pod stop p1','stop pod p1','pod stop p1'] # two refusals, then it worked, then silence

def test_a_second_call_buys_no_time(pod):
    assert pod('--off-volume', '--hours', '1', RUNPOD_POD_ID='p1').returncode==0
    first = (pod.path/'deadline').read_text(); pid = int(first.split()[2])
    try:
        r = pod('--off-volume', '--hours', '9', RUNPOD_POD_ID='p1')
        assert 'armed already' in r.stdout and (pod.path/'deadline').read_text()==first
    finally: end(pid)
    time.sleep(.2)
    r = pod('--off-volume', '--hours', '9', RUNPOD_POD_ID='p1') # the guard was killed: it comes back with the old end
    now = (pod.path/'deadline').read_text()
    assert abs(int(now.split()[0])-int(first.split()[0]))<=1 and now.split()[2]!=first.split()[2]

def test_no_way_to_stop_is_refused(pod):
    if shutil.which('runpodctl'): pytest.skip('this machine has runpodctl')
    first = dict(DEEPFAKE_NB_POD_ENVIRON=str(pod.path/'nowhere'))
    assert 'runpodctl is missing' in pod('--off-volume', ctl_there=False, RUNPOD_POD_ID='p1', **first).stderr
    assert pod('--off-volume', '--no-deadline', ctl_there=False, RUNPOD_POD_ID='p1').returncode==0

def test_a_pod_without_its_name(pod):
    "Over SSH the container's variables are missing: the name is found with process 1, or asked for"
    first = pod.path/'environ'; first.write_bytes(b'A=1\0RUNPOD_API_KEY=secret\0RUNPOD_POD_ID=p9\0')
    r = pod('--dry-run', ctl_there=True, DEEPFAKE_NB_POD_ENVIRON=str(first))
    assert r.returncode==0 and 'runpodctl pod stop' in r.stdout and 'p9' in r.stdout and 'secret' not in r.stdout+r.stderr
    first.write_bytes(b'A=1\0')
    for f in (first,pod.path/'nowhere'):
        r = pod('--dry-run', ctl_there=True, DEEPFAKE_NB_POD_ENVIRON=str(f))
        assert r.returncode==1 and 'RUNPOD_POD_ID is not known' in r.stderr

def test_compile_needs_consent(pod):
    r = pod('--off-volume', '--cuda-extra', STUB_TORCH='2.14.1')
    assert r.returncode==1 and '--accept-compile' in r.stderr and '$' in r.stdout
    assert not any('-m|pip' in l for l in pod.log()) # asked before anything was installed
    assert 'compiling' not in pod('--dry-run', '--cuda-extra', STUB_TORCH='2.10.0').stdout
