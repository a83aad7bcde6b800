"""The pod's own layers, with runpod/start.sh run for real: set-up, Lab, watchdog and plan are processes of this machine; `runpodctl`, `nvidia-smi` and the image's
own start are small scripts, and the provider's API is a server on loopback. When the provider hears the stop, everything that belongs to the pod is killed."""
import json,os,pty,re,shutil,signal,socket,stat,subprocess,sys,tempfile,threading,time,urllib.error,urllib.request
from pathlib import Path
import psutil,pytest
from common import wait_for as _wait
from fake_runpod import Fake

def wait_for(f, seconds=20): return _wait(f, seconds)

ROOT = Path(__file__).resolve().parent.parent
SECRETS = dict(RUNPOD_API_KEY='rpa_PLANTED1', HF_TOKEN='hf_PLANTED2', AWS_SECRET_ACCESS_KEY='aws_PLANTED3', DB_PASSWORD='pw_PLANTED4', JUPYTER_PASSWORD='jp_PLANTED5')
# python: what set-up asks is answered here, what runs on the pod is run by the real one
PYTHON = rf'''#!/bin/bash
[ -z "$BROKEN" ] || exit 127
case "$*" in
  *'"none"'*) echo 2.14.1 ;;
  *'u.find_spec(n)'*) echo torch==2.14.1 ;;
  *'-m venv'*) mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python" ;;
  *'-m pip'*) [ -z "$HANG" ] || {{ touch "$BOX/hangs"; sleep 60; }} ;;
  '-m deepfake_nb.guard cache'*) env > "$BOX/set-up.env" ;;
  '-c '*) ;;
  *) exec {sys.executable} "$@" ;;
esac
'''
CTL = r'''#!/bin/bash
echo "$*" >> "$BOX/asked"; echo "no route for ${RUNPOD_API_KEY:-nobody}" >&2
[ "$(wc -l < "$BOX/asked")" -gt "${REFUSALS:-0}" ] || exit 1
[ -z "$NEEDS_KEY" ] || [ "$RUNPOD_API_KEY" = "$NEEDS_KEY" ] || { echo Unauthorized >&2; exit 1; }
[ -z "$MAY_NOT" ] || [[ "$*" != $MAY_NOT* ]] || exit 1
[ ! -e "$DEEPFAKE_NB_HOME/shipped/shipped.json" ] || touch "$BOX/shipped first"
[ -e "$BOX/heard" ] || touch "$BOX/heard"
'''
SMI = '#!/bin/bash\ncat "$BOX/gpu"\n'
BASE = '#!/bin/bash\nenv > "$BOX/base.env"; echo sshd; sleep 1000\n'

class Pod:
    "A machine that costs by the hour"
    def __init__(self, box, **env):
        self.box,self.vol,self.p = box,box/'vol',None
        for d in ('bin','vol'): (box/d).mkdir(parents=True)
        for n,text in (('python3',PYTHON),('runpodctl',CTL),('nvidia-smi',SMI),('base',BASE)): (box/'bin'/n).write_text(text); (box/'bin'/n).chmod(0o755)
        (box/'gpu').write_text('50\n'); (box/'environ').write_bytes(b'')
        clean = {k:v for k,v in os.environ.items() if not re.search('RUNPOD|DEEPFAKE|JUPYTER|KEY|TOKEN|SECRET|PASSWORD', k)}
        self.env = clean|dict(PATH=f'{box/"bin"}:{os.environ["PATH"]}', BOX=str(box), RUNPOD_POD_ID='pod001', DEEPFAKE_NB_HOME=str(self.home), DEEPFAKE_NB_DEADLINE_FILE=str(box/'deadline'), DEEPFAKE_NB_DEADLINE_RETRY='.2',
            DEEPFAKE_NB_DEADLINE_AGAIN='.5', DEEPFAKE_NB_POD_ENVIRON=str(box/'environ'), DEEPFAKE_NB_BASE_START=str(box/'bin'/'base'), DEEPFAKE_NB_RUNPOD_API='http://127.0.0.1:9/v2', DEEPFAKE_NB_LOG=str(box/'log'), TMPDIR=str(box), PUBLIC_KEY='ssh-ed25519 AAAA')|SECRETS|env
    home = property(lambda self: self.vol/'deepfake_nb')
    log = property(lambda self: (self.box/'log').read_text())
    def start(self, *args, seconds=1000, plan='true', before=(), **kw):
        "start.sh, with a deadline in so many seconds"
        self.began = time.time()
        cmd = [*before, 'bash', ROOT/'runpod'/'start.sh', '--off-volume', '--volume', self.vol, '--hours', f'{seconds/3600:.6f}', '--margin', '0', *args, '--', 'bash', '-c', plan]
        with open(self.box/'log', 'ab') as log: self.p = subprocess.Popen(cmd, env=self.env, start_new_session=True, **(dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)|kw))
        return self
    def over_ssh(self):
        "A session that lacks what the container knows"
        there = {k:self.env.pop(k) for k in ('RUNPOD_POD_ID','RUNPOD_API_KEY')}; (self.box/'environ').write_bytes(b'\0'.join(f'{k}={v}'.encode() for k,v in there.items())+b'\0'); return self
    def run(self, *words):
        "One of guard's commands alone"
        with open(self.box/'log', 'ab') as log: self.p = subprocess.Popen([sys.executable,'-m','deepfake_nb.guard',*words], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        return self
    def family(self):
        "Every process of this pod"
        def mine(p):
            try: return p.environ().get('BOX')==str(self.box) and p.status()!=psutil.STATUS_ZOMBIE
            except psutil.Error: return False
        return [p for p in psutil.process_iter() if mine(p)]
    def lines(self):
        "pid -> command line"
        res = {}
        for p in self.family():
            try: res[p] = p.cmdline()
            except psutil.Error: pass
        return res
    def of(self, *words): return [p for p,l in self.lines().items() if all(any(w in a for a in l) for w in words) and not (l and l[0].endswith('bash') and 'keep_watch' in l)]
    def heard(self, seconds=20):
        "Wait until the provider hears the stop: s since the start. Then the machine is gone"
        wait_for(lambda: (self.box/'heard').exists(), seconds); took = (self.box/'heard').stat().st_mtime-self.began
        self.kill(); return took
    def asked(self): return (self.box/'asked').read_text().splitlines()
    def kill(self):
        while fam := self.family():
            for p in fam:
                try: p.kill()
                except psutil.NoSuchProcess: pass
            time.sleep(.02)
        if self.p: self.p.wait()

@pytest.fixture
def pod(tmp_path):
    pods = []
    def make(**env): pods.append(Pod(tmp_path/f'pod{len(pods)}', **env)); return pods[-1]
    yield make
    for p in pods: p.kill()
    assert not any(p.family() for p in pods)

@pytest.fixture
def volume():
    "A place on a disk of its own, as a network volume is"
    if not os.path.isdir('/dev/shm') or os.stat('/dev/shm').st_dev==os.stat('/').st_dev: pytest.skip('there is no second disk here')
    d = Path(tempfile.mkdtemp(dir='/dev/shm')); yield d; shutil.rmtree(d)

def on(volume, p): p.vol.rmdir(); p.vol.symlink_to(volume); return p

def port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

# ---- layer 1: the deadline

DEAF = 'trap "" TERM; touch $BOX/plan; while :; do sleep .1; done'
CASES = dict(set_up_hangs=dict(HANG='1'), plan_ignores_sigterm={}, python_is_broken=dict(BROKEN='1'), python_is_broken_no_stay=dict(BROKEN='1'), first_command_is_wrong={})

@pytest.fixture(scope='module')
def nights(tmp_path_factory):
    "Several pods at once, each with something broken and a deadline in 3 s (the deaf plan 5 s)"
    pods = {k:Pod(tmp_path_factory.mktemp(k)/'pod', DEEPFAKE_NB_DEADLINE_AGAIN='60', **v) for k,v in CASES.items()}
    for k,p in pods.items():
        p.start('--no-lab', *['--stay']*(k in ('set_up_hangs','python_is_broken')), *['--margin','10']*(k=='plan_ignores_sigterm'), *['--frobnicate']*(k=='first_command_is_wrong'),
                seconds=5 if k=='plan_ignores_sigterm' else 3, plan=DEAF, before=['unshare','--pid','--fork','--kill-child']*(k=='first_command_is_wrong'))
    yield pods
    for p in pods.values(): p.kill()

@pytest.mark.parametrize('case,least,most', [('set_up_hangs',2,5), ('plan_ignores_sigterm',4,7), ('python_is_broken',0,2.5), ('python_is_broken_no_stay',0,2.5)])
def test_deadline(nights, case, least, most):
    "Whatever is broken, the machine is asked to stop; --stay is heard once there is a watchdog"
    p = nights[case]; took = p.heard()
    assert least<=took<most and p.asked()[0]=='pod stop pod001', (took, p.asked(), p.log)
    assert dict(set_up_hangs=(p.box/'hangs').exists() and 'set-up failed' not in p.log, plan_ignores_sigterm='it has 60 s to end' in p.log and 'killed' not in p.log).get(case, 'set-up failed' in p.log)

def test_a_first_command_that_is_wrong(nights):
    "As process 1, a container that exits would be started again, for ever"
    if subprocess.run(['unshare','--pid','--fork','true'], capture_output=True).returncode: pytest.skip('no right to make a process 1 here')
    p = nights['first_command_is_wrong']; p.heard(); assert "unknown option '--frobnicate'" in p.log and 'so the pod is stopped' in p.log

def test_the_tool_fails_three_times(pod):
    p = pod(REFUSALS='3', BROKEN='1').start('--no-lab', '--stay', seconds=1)
    p.heard(); assert p.asked()==['pod stop pod001','stop pod pod001']*2
    words = p.log+(p.box/'deadline.log').read_text(); assert 'no route for [key]' in words and 'PLANTED' not in words

@pytest.mark.parametrize('args', [(), ('--no-deadline',), ('--no-deadline','--no-plan','--idle-minutes','.02')])
def test_over_ssh_each_layer_finds_name_and_key(pod, args):
    "A session lacks the container's variables: deadline, runner and watchdog look them up, each for itself"
    p = pod(NEEDS_KEY=SECRETS['RUNPOD_API_KEY']).over_ssh(); (p.box/'gpu').write_text('0\n'); p.start('--no-lab', *args, plan='mkdir -p runs/r; env > runs/r/run.json'); p.heard()
    assert p.asked()==['pod stop pod001'] and ('ship: 2 files' in p.log)==('--no-plan' not in args) and 'PLANTED' not in p.log and ('watch: no work' in p.log)==('--no-plan' in args)
    assert all(b'PLANTED' not in b for f,b in told_everywhere(p).items() if f!=p.box/'environ')

def test_the_runner_gives_up_where_the_shell_goes_on(pod):
    p = pod(REFUSALS='12'); p.home.mkdir(); p.run('run', '--dest', p.box/'away', '--tries', '2', '--', 'true'); assert p.p.wait(30)==0 and len(p.asked())==4 # two rounds of two words

def arm(then, **env): return subprocess.run(['bash','-c',f'. {ROOT}/runpod/deadline.sh; know_pod; {then}'], env=env, capture_output=True, text=True, timeout=30).stdout
def test_a_note_that_cannot_be_written_costs_no_deadline(pod):
    "A disk that is full, or read-only: the switch waits, only one of them, and how long is known"
    p = pod(); p.env['DEEPFAKE_NB_DEADLINE_FILE'] = str(p.box/'nowhere'/'deadline')
    said = arm('arm_deadline 1; arm_deadline 9; deadline_left', **p.env); assert 'stops itself in 3600 s' in said and 'armed already' in said and 3590<int(said.split()[-1])<=3600 and len(p.of('deepfake_nb-deadline'))==1, said
    p.start('--no-lab', '--hours', '1', plan='sleep .2', seconds=3600); p.heard(); assert '--limit 3' in p.log
    assert 'NOT armed' in (said := arm('setsid() { return 1; }; arm_deadline 1 || echo failed', **p.env)) and 'failed' in said
    assert 'NOT armed' in arm('setsid() { sleep 4; }; arm_deadline 1 # as the first command of a pod does, this one speaks of deepfake_nb-deadline', **p.env) # just forked, it is not armed yet

@pytest.mark.parametrize('args', [('--no-lab',), ('--no-lab','--python','python9')])
def test_a_second_start_ends_nothing(pod, args):
    "Nor does it give the first one a deadline, nor begin a second plan where only start.sh was killed"
    p = pod().start('--no-lab', '--no-deadline', plan='touch $BOX/plan; sleep 60'); wait_for((p.box/'plan').exists); (p.box/'plan').unlink()
    again = lambda: subprocess.run(['bash',ROOT/'runpod'/'start.sh','--off-volume','--volume',p.vol,*args], env=p.env, capture_output=True, text=True, timeout=30)
    def nothing(r, who): assert r.returncode==0 and f'{who} is at work here already' in r.stdout and not (p.box/'asked').exists() and p.of('sleep 60') and not (p.box/'deadline').exists(), r.stdout+r.stderr
    nothing(again(), 'start.sh'); p.p.kill(); wait_for(lambda: subprocess.run(['flock','-n',p.box/'deadline.lock','true']).returncode==0) # nobody else holds it
    nothing(again(), 'a plan'); assert not (p.box/'plan').exists()

def test_a_lock_that_cannot_be_had_is_no_lock_that_is_held(pod):
    p = pod(); (p.box/'bin'/'flock').write_text('#!/bin/bash\nexit 71\n'); (p.box/'bin'/'flock').chmod(0o755)
    p.start('--no-lab'); p.heard(); assert 'no lock at' in p.log and 'ship: 1 files' in p.log

# ---- the image's own start

def test_the_images_start_is_started_beside_ours(tmp_path):
    "A root of its own, in which process 1 is a launched pod's first command: /start.sh is not /opt/deepfake_nb/runpod/start.sh"
    root = tmp_path/'root'; made = f"""set -e; mkdir {root}; mount -t tmpfs t {root}; cd {root}; mkdir -p proc tmp dev opt/deepfake_nb workspace
        for d in /*; do case $d in /proc|/tmp|/dev|/opt|/workspace|/start.sh) ;; *) if [ -L $d ]; then cp -P $d .$d; elif [ -d $d ]; then mkdir -p .$d; mount --rbind $d .$d; fi ;; esac; done; mount --rbind /dev dev
        cp -r {ROOT}/runpod opt/deepfake_nb; printf '#!/bin/bash\necho sshd of the image' >start.sh; chmod +x start.sh; mount -t proc proc proc"""
    run = lambda first: subprocess.run(['unshare','--mount','--pid','--fork','--kill-child','bash','-c',f'{made}; exec chroot {root} {first}'], capture_output=True, text=True, timeout=60, env={k:v for k,v in os.environ.items() if not re.search('RUNPOD|DEEPFAKE', k)})
    start = 'bash /opt/deepfake_nb/runpod/start.sh --dry-run --no-deadline --off-volume --no-lab; exit $?'
    if (r := run('true')).returncode: pytest.skip(f'no right to make a root and a process 1 here: {r.stderr[-200:]}')
    root.rmdir(); assert '+ bare /start.sh' in (r := run(f'bash -c {start!r}')).stdout, r.stderr+r.stdout
    root.rmdir(); assert '/start.sh runs already' in (r := run(f"bash -c {start!r} /start.sh")).stdout, r.stderr+r.stdout

def test_only_rest_works(pod):
    with Fake(key=SECRETS['RUNPOD_API_KEY']) as fake:
        id = fake.make({})['id']; faults = iter(['500','down','garbage'])
        fake.fault = lambda m, path: next(faults, None) if m=='POST' else None
        for words in (['--stay'], []): # the shell's way, then Python's
            env = dict(REFUSALS='999', DEEPFAKE_NB_RUNPOD_API=fake.url, RUNPOD_POD_ID=id)
            p = pod(**env, BROKEN='1').start('--no-lab', *words, seconds=1) if words else pod(**env).run('stop')
            wait_for(lambda: fake.pods[id]['status']=='EXITED', 20); p.kill()
            fake.pods[id].update(status='RUNNING', end=None); faults = iter(['500'])
        assert [c[2] for c in fake.calls]==[f'/v2/pods/{id}/action']*len(fake.calls) and len(fake.calls)>=6
        assert 'PLANTED' not in p.log and 'REST: HTTP 500' in p.log

def test_nothing_ends_the_deadline_but_sigkill_and_that_not_for_long(pod):
    p = pod().start('--no-lab', seconds=30, plan='touch $BOX/plan; sleep 60'); wait_for((p.box/'plan').exists)
    first = p.of('deepfake_nb-deadline'); [q.send_signal(s) for q in first for s in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)]; time.sleep(.2)
    assert [q.pid for q in p.of('deepfake_nb-deadline')]==[q.pid for q in first]!=[]
    end = (p.box/'deadline').read_text().split()[0]; [q.kill() for q in first]
    wait_for(lambda: p.of('deepfake_nb-deadline')); assert abs(int((p.box/'deadline').read_text().split()[0])-int(end))<=1

# ---- layer 2: the runner's last act

def records(p): return sorted(json.loads((p.home/'shipped'/'shipped.json').read_text())['files'])

def test_plan_fails_and_results_are_shipped_before_the_stop(pod):
    p = pod().start('--no-lab', plan='mkdir -p runs/r; echo 1 > runs/r/run.json; exit 3'); p.heard()
    assert (p.box/'shipped first').exists() and records(p)==['pod/ending.json','runs/r/run.json']
    assert json.loads((p.home/'shipped'/'pod'/'ending.json').read_text())['code']==3 and 'plan: exit 3' in p.log

def test_shipping_fails_and_the_pod_is_stopped_not_terminated(pod):
    p = pod(); (p.vol/'file').write_text(''); p.start('--no-lab', '--terminate', '--ship', p.vol/'file'/'x', plan='mkdir -p runs/r; echo 1 > runs/r/run.json'); p.heard()
    assert p.asked()==['pod stop pod001'] and f'The results are still at {p.home}' in p.log and (p.home/'runs'/'r'/'run.json').exists()

def test_terminated_only_when_all_arrived(pod, volume):
    p = on(volume, pod(RUNPOD_VOLUME_ID='v1')).start('--no-lab', '--terminate'); p.heard()
    assert p.asked()==['pod delete pod001'] and (p.box/'shipped first').exists()

def test_the_only_copy_is_not_removed(pod):
    "Without a network volume, or beside it, results that lie on the pod would go with it"
    if os.stat(pod().box).st_dev!=os.stat('/').st_dev: pytest.skip('the temporary folder is on a disk of its own')
    for env,why in (({}, 'RUNPOD_VOLUME_ID is not set'), (dict(RUNPOD_VOLUME_ID='v1'), "lies on the container's own disk")):
        p = pod(**env).start('--no-lab', '--terminate', plan='mkdir -p models; echo best > models/m'); p.heard()
        assert p.asked()==['pod stop pod001'] and 'not removed, only stopped' in p.log and why in p.log and 'models/m' in records(p)

def test_a_removal_that_is_refused_becomes_a_stop(pod, volume):
    p = on(volume, pod(RUNPOD_VOLUME_ID='v1', MAY_NOT='*pod')).start('--no-lab', '--terminate')
    wait_for(lambda: (p.box/'asked').exists() and 'pod stop pod001' in p.asked(), 30); p.kill()
    assert p.asked()[:7]==['pod delete pod001','remove pod pod001']*3+['pod stop pod001']

def test_runner_is_killed(pod):
    p = pod().start('--no-lab', plan='touch $BOX/plan; sleep 100'); wait_for((p.box/'plan').exists); [q.kill() for q in p.of('deepfake_nb.guard','--dest')]
    p.heard(); assert 'this pod is still there' in p.log

def test_a_lost_terminal_ends_nothing(pod):
    p = pod(); a,b = pty.openpty(); p.start('--no-lab', plan='touch $BOX/plan; sleep 1.5; mkdir -p runs/r; echo 1 > runs/r/run.json', stdin=b, stdout=b, stderr=b); os.close(b)
    wait_for((p.box/'plan').exists); os.close(a); os.killpg(p.p.pid, signal.SIGHUP); p.heard()
    assert 'runs/r/run.json' in records(p)

def test_a_signal_is_one_to_the_plan(pod):
    "The container is asked to end: the plan may write its checkpoint, and what it wrote is shipped; during set-up the pod just ends"
    p,q = pod(),pod(HANG='1'); q.start('--no-lab'); p.start('--no-lab', plan='mkdir -p runs/r; trap "echo saved > runs/r/run.json; exit 0" TERM; touch $BOX/plan; while :; do sleep .1; done')
    wait_for((p.box/'plan').exists); p.p.terminate(); p.heard(); assert (p.home/'shipped'/'runs'/'r'/'run.json').read_text()=='saved\n' and 'plan: SIGTERM' in p.log
    wait_for((q.box/'hangs').exists); q.p.terminate(); wait_for((q.box/'heard').exists); wait_for(lambda: not q.of('setup_pod.sh')); assert 'a signal during set-up' in q.log

# ---- layer 3: the watchdog

IDLE = ('watch','--minutes','.02','--every','.1') # 1.2 s

def test_an_idle_pod_is_stopped(pod):
    p = pod(); (p.box/'gpu').write_text('0\n'); p.start('--no-lab', '--no-plan', '--idle-minutes', '.02')
    p.heard(); assert 'watch: no work for 0.02 min; the last was: it began' in p.log

def test_each_sign_alone_keeps_it(pod):
    "Three pods, each with one sign of work; when it ends, the pod does"
    signs = dict(gpu=None, lease='checkpoints/m/lease', heartbeat='runs/r/status.json'); pods = {k:pod() for k in signs}; files = {k:pods[k].home/f for k,f in signs.items() if f}
    for f in files.values(): f.parent.mkdir(parents=True); f.touch()
    for k,p in pods.items(): (p.box/'gpu').write_text(dict(gpu='90\n', lease='0\n', heartbeat='[Not Supported]\n')[k]); p.run(*IDLE)
    end = time.monotonic()+3
    while time.monotonic()<end:
        for f in files.values(): os.utime(f, ns=(n := time.monotonic_ns(), n)) # a clock that is decades behind
        time.sleep(.1); assert not any((p.box/'asked').exists() for p in pods.values())
    (pods['gpu'].box/'gpu').write_text('2\n')
    for k,p in pods.items(): p.began = time.time(); p.heard(); assert ('GPU: unknown' in p.log)==(k=='heartbeat')

def test_a_watchdog_that_dies_comes_back(pod):
    p = pod().start('--no-lab', '--no-plan'); one = wait_for(lambda: p.of('deepfake_nb.guard','--token-file'))
    one[0].kill(); wait_for(lambda: [q for q in p.of('deepfake_nb.guard','--token-file') if q.pid!=one[0].pid]); assert 'it is started again' in p.log

def test_a_plan_that_hangs_ships_before_the_watchdog_stops(pod):
    "The runner hears SIGTERM first; if it is deaf as well, the pod is stopped all the same"
    p = pod(); (p.box/'gpu').write_text('0\n'); p.start('--no-lab', '--idle-minutes', '.03', '--grace', '1', plan='mkdir -p runs/r; echo half > runs/r/run.json; sleep 600'); p.heard()
    assert 'The plan that is there is ended' in p.log and 'plan: SIGTERM' in p.log and 'runs/r/run.json' in records(p) and (p.box/'shipped first').exists()
    from deepfake_nb.guard import runners_of,watch
    h = p.box/'home'; t,ended = [0.],[]; others = [subprocess.Popen([sys.executable,'-c',f'import signal,time; signal.signal({n}, signal.SIG_IGN); time.sleep(60)','deepfake_nb.guard','run','--'], env=p.env|dict(DEEPFAKE_NB_HOME=str(h))) for n in ('signal.SIGTERM','signal.SIGINT')]
    try: # two beside each other, one of them deaf: both are told, and the deaf one is waited for
        wait_for(lambda: sorted(runners_of(h))==sorted(o.pid for o in others)); time.sleep(.5)
        watch(h, 1., gpu=lambda: 0., renewed=lambda: False, sleep=lambda s: (t.__setitem__(0, t[0]+s), time.sleep(.05)), now=lambda: t[0], stop=lambda: ended.append(t[0]), say=lambda s: None, last=2.)
        assert ended==[180] and [o.poll() for o in others]==[None,-signal.SIGTERM]
    finally: [o.kill() for o in others]; [o.wait() for o in others]
    assert runners_of(h)==[]

def test_a_plan_beside_another_leaves_it_to_be_told(pod):
    "What start.sh itself recommends: the second plan's end is not the end of the first one's runner"
    p = pod(); (p.box/'gpu').write_text('0\n'); p.start('--no-lab', '--idle-minutes', '.1', '--grace', '1', plan='mkdir -p runs/r; echo half > runs/r/run.json; touch $BOX/plan; sleep 600'); wait_for((p.box/'plan').exists)
    subprocess.run([sys.executable,'-m','deepfake_nb.guard','run','--dest',p.box/'beside','--stay','--','true'], env=p.env, check=True, capture_output=True)
    beside,first = json.loads((p.home/'pod'/'ending.json').read_text()).get('beside'),[q.pid for q in p.of('deepfake_nb.guard','--dest')]
    p.heard(); assert 'The plan that is there is ended' in p.log and (p.box/'shipped first').exists() and 'runs/r/run.json' in records(p) and beside==first!=[]

def test_shipped_by_hand_it_is_the_end_all_the_same(pod):
    "Shipping failed; another pod of the volume does it. In the middle of a plan it is no end"
    p = pod(); (p.vol/'file').write_text(''); p.start('--no-lab', '--ship', p.vol/'file'/'x', plan='mkdir -p runs/r; echo 1 > runs/r/run.json; exit 3'); p.heard(); assert 'ship: FAILED' in p.log
    def by_hand():
        subprocess.run([sys.executable,'-m','deepfake_nb.guard','ship',p.home/'shipped'], env=p.env|dict(RUNPOD_POD_ID='pod002'), check=True, capture_output=True); m = json.loads((p.home/'shipped'/'shipped.json').read_text()); return [m[k] for k in ('pod','final','code')]
    assert by_hand()==['pod001',True,3]==by_hand()
    p.run('run', '--dest', p.box/'away', '--stay', '--', 'bash', '-c', 'echo 2 > $DEEPFAKE_NB_HOME/runs/r/run.json; touch $BOX/plan; sleep 60'); wait_for((p.box/'plan').exists)
    assert by_hand()==['pod002',False,None]; p.p.kill(); assert by_hand()==['pod002',False,None] # killed: it has no ending

# ---- Lab, and secrets

def ask(url, token=None, data=None):
    try: return 200,json.load(urllib.request.urlopen(urllib.request.Request(url, data, headers={'Authorization':f'token {token}'} if token else {}), timeout=5))
    except urllib.error.HTTPError as e: return e.code,None
    except OSError: return 0,None

def told_everywhere(p):
    "All that was written under the box, file by file; not the clone of this checkout, which has the planted words in its tests"
    return {f:f.read_bytes() for f in p.box.rglob('*') if f.is_file() and not f.is_symlink() and p.home/'book' not in f.parents}

def test_lab_and_secrets(pod):
    "Lab, really started: on loopback, with its token, a busy kernel keeps the pod. And what was planted in the environment is nowhere"
    n = port(); p = pod(REFUSALS='1'); (p.box/'gpu').write_text('0\n')
    p.start('--port', str(n), '--idle-minutes', '.04', '--grace', '1', plan='mkdir -p runs/r; touch runs/r/run.json; env > runs/r/env; env; sleep 100') # never a sign of life again
    token = wait_for(lambda: (p.home/'pod'/'token').exists() and (p.home/'pod'/'token').read_text()); url = f'http://127.0.0.1:{n}'
    assert stat.S_IMODE((p.home/'pod'/'token').stat().st_mode)==0o600 and len(token)==64
    busy = threading.Event()
    def alive(): # signs of life until the kernel is busy
        while not busy.wait(.1):
            if (f := p.home/'runs'/'r'/'run.json').exists(): os.utime(f)
    threading.Thread(target=alive, daemon=True).start()
    wait_for(lambda: ask(f'{url}/api/kernels', token)[0]==200)
    book = next((p.home/'book').iterdir()); assert ask(f'{url}/api/contents', token)[0]==200 and (book/'.git').exists() and any(f.suffix=='.ipynb' for f in (book/'nbs').iterdir())
    mine = book/'nbs'/'mine.ipynb'; mine.write_text('{}'); subprocess.run(['bash',ROOT/'runpod'/'lab.sh','--volume',p.vol,'--port',str(n)], env=p.env, capture_output=True); assert mine.exists() and not list((p.home/'book').glob('*.part')) # made once
    assert {c.laddr.ip for q in p.of('jupyterlab') for c in q.net_connections() if c.status=='LISTEN'}=={'127.0.0.1'} and [ask(f'{url}/api/kernels', t)[0] for t in (None,'wrong')]==[403,403]
    code,k = ask(f'{url}/api/kernels', token, b'{}'); assert code in (200,201)
    from jupyter_client import BlockingKernelClient
    c = BlockingKernelClient(connection_file=str(wait_for(lambda: next(p.box.rglob(f'kernel-{k["id"]}.json'), None)))); c.load_connection_file(); c.start_channels()
    def works(): # of a kernel this young Lab may not have heard yet that it began: then it is asked again
        c.execute('import os,time; open(os.environ["BOX"]+"/kernel.env","w").write(str(dict(os.environ))); time.sleep(5)'); end = time.monotonic()+6
        while time.monotonic()<end:
            if ask(f'{url}/api/kernels', token)[1][0]['execution_state']=='busy': return True
            time.sleep(.05)
    wait_for(works); busy.set()
    lines = []; end = time.monotonic()+4
    while time.monotonic()<end: lines += map(str, p.lines().values()); time.sleep(.2); assert not (p.box/'asked').exists() # busy, and that is the only sign
    c.stop_channels(); p.heard()
    assert 'the last was: 1 busy kernels' in p.log and f'ssh -N -L {n}:127.0.0.1:{n}' in p.log and len(p.asked())==2
    written = told_everywhere(p); assert {'base.env','kernel.env','set-up.env'}<={f.name for f in written} and p.home/'runs'/'r'/'env' in written
    for name,text in [(f,t) for f,t in written.items()]+[('command lines',' '.join(lines).encode())]:
        assert b'PLANTED' not in text, name
        if 'deepfake_nb.lab' not in str(name) and name!=p.home/'pod'/'token': assert token.encode() not in text, name
    assert b'PUBLIC_KEY=ssh' in written[p.box/'base.env'] and b'no route for [RUNPOD_API_KEY]' in written[p.box/'log']

def test_shell_and_python_agree_on_what_is_secret():
    from deepfake_nb.guard import secret_names
    import deepfake_nb.guard,deepfake_nb.pod
    assert {deepfake_nb.guard.API,deepfake_nb.pod.API,*re.findall(r'https://[^}\s]+', next(l for l in (ROOT/'runpod'/'deadline.sh').read_text().splitlines() if 'API=' in l))}=={deepfake_nb.pod.API} # three that must not need each other
    names = 'API_KEY apikey HF_TOKEN token_x MY_SECRET_1 PASSWORD db_password GOOGLE_CREDENTIALS PGPASSWD PUBLIC_KEY HOME MONKEY KEEP PASSPORT'.split(); env = dict.fromkeys(names, 'x')|dict(PATH=os.environ['PATH'])
    said = subprocess.run(['bash','-c',f'. {ROOT}/runpod/lib.sh; hidden'], env=env, capture_output=True, text=True, check=True).stdout.split('\n')
    assert sorted(s for s in said if s and s!='-u')==secret_names(env)==sorted(set(names)-{'PUBLIC_KEY','HOME','KEEP','PASSPORT'})

def test_lab_is_not_opened_without_the_words(pod):
    run = lambda *a: subprocess.run(['bash',ROOT/'runpod'/'lab.sh','--dry-run',*a], env=pod().env, capture_output=True, text=True)
    for a in (['--lab-proxy'], ['--lab-proxy','yes']): r = run(*a); assert r.returncode==1 and 'can be reached by everybody' in r.stderr and 'jupyterlab' not in r.stdout
    assert '--ServerApp.ip=0.0.0.0' in run('--lab-proxy', 'yes, open to the internet').stdout and '--ServerApp.ip=127.0.0.1' in run().stdout

# ---- set-up and the dry run

def test_a_named_secret_is_there_for_set_up_too(pod):
    "Weights at s3:// need it; the others stay away, and sshd gets none"
    p = pod().start('--no-lab', '--keep-secret', 'AWS_SECRET_ACCESS_KEY'); p.heard(); names = lambda f: [k for k,v in SECRETS.items() if v in (p.box/f).read_text()]
    assert names('set-up.env')==['AWS_SECRET_ACCESS_KEY'] and names('base.env')==[]

def test_set_up_that_takes_too_long_names_its_step(pod):
    p = pod(HANG='1').start('--no-lab', '--minutes', '.03', seconds=1000); p.heard()
    assert "the step 'install the rest' was not done after .03 minutes" in p.log and 's  python and torch' in p.log and not p.of('pip')

def test_dry_run_prints_all_and_touches_nothing(pod):
    p = pod(); before = sorted(p.box.rglob('*')); r = subprocess.run(['bash',ROOT/'runpod'/'start.sh','--dry-run','--off-volume','--volume',p.vol], env=p.env, capture_output=True, text=True)
    assert r.returncode==0 and sorted(p.box.rglob('*'))==before and not p.family(), r.stderr
    plan = [l for l in r.stdout.splitlines() if l.startswith('+')]; at = [next(i for i,l in enumerate(plan) if w in l) for w in ('deepfake_nb-deadline','bin/base','setup_pod.sh','jupyterlab --no-browser','guard watch','guard run')]
    assert at==sorted(at) and at[0]==0 and 'deepfake_nb.plan run five_dollars' in plan[-1] and '--limit 71400' in plan[-1] and plan[-1].endswith("-p 'gpu=RTX 4090' -p price=0.39") and 'at worst this costs $7.80' in r.stdout and 'guard cache' in r.stdout and f'--weights {p.vol}/convnextv2_base.safetensors' in r.stdout and 'PLANTED' not in r.stdout
