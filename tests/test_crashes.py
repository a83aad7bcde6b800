"""Kills at random moments of a whole plan, and the other accidents: each ends in the plan that nobody disturbed, or in an error that says what to do.
SOAK=N: N kills, and three under papermill for each fifty of them. CRASH_SEED: of the draws. In a process of its own, for it forks."""
import itertools,json,os,random,resource,shutil,subprocess,sys,tempfile,time
from pathlib import Path
import psutil,pytest
import laboratory as L
from common import wait_for
from deepfake_nb.checkpoints import latest
from deepfake_nb.journal import read_rows
from deepfake_nb.executors import notebook
from deepfake_nb.presets import last_words
from deepfake_nb.runs import Record,_family

SOAK,SEED = int(os.environ.get('SOAK') or 0),int(os.environ.get('CRASH_SEED') or 0)
A = 1 # number of Phase A in the plan

@pytest.fixture(scope='module')
def lab():
    with tempfile.TemporaryDirectory(prefix='crashes') as root: yield L.Laboratory(root, plan=L.PLAN if SOAK else L.PLAN[:3], steps=4)

@pytest.fixture
def room(lab, request):
    "A room whose films are prepared: Phase A is next"
    r = lab.after(L.re.sub(r'\W+', ' ', request.node.name), 1); yield r
    shutil.rmtree(r.home)

def same(lab, room): assert L.differences(lab.whole, room)==[]

def hurt(lab, room, rows=3):
    "Phase A, killed after so many rows of its journal: there are checkpoints, and a good part is still to be done"
    a = lab.start(room, A, watch=L.after_row(lab.next_run(room, A), rows, 0)); assert a.killed
    return next((room.home/'checkpoints').glob('phase_a-*'))

def finished(lab, room, **how): return lab.run('', room=room, upto=A+1, **how)

def test_killed_at_random(lab, capsys):
    "Plan after plan, up to so many kills"
    start = time.monotonic(); got = L.series(lab, SOAK or 12, SEED, each=4)
    s = L.summary(lab, *got, SEED, time.monotonic()-start)
    with capsys.disabled(): print('\n'+L.table(s))
    assert s['differences']==[] and s['kills']>=(SOAK or 12)
    hit = {k for kinds in s['where'].values() for k in kinds}
    if SOAK>=200: assert {'writing a shard','finding faces','a step of training','writing a checkpoint','judging','named weights and their card'} <= hit

def test_torn_in_the_middle_of_a_file(lab, room):
    "Half of the named weights, half a state, half a manifest, one after the other: what lay there before is what counts"
    for files in (r'_best.*safetensors', r'-step.*pt\.', r'-step.*json\.'):
        assert lab.start(room, A, die_at=(1, files), torn=True).killed and [p for p in room.home.rglob('*.part') if L.re.search(files, p.name)]
    finished(lab, room); same(lab, room)

# ---- what the laboratory is for: it must see these

def skips_a_batch():
    from deepfake_nb.batches import PairSampler
    init = PairSampler.__init__
    def wrong(self, n, epoch=0, pairs=1, start=0): init(self, n, epoch, pairs, start+pairs if start else 0)
    PairSampler.__init__ = wrong

def test_a_resume_that_skips_a_batch_is_caught(lab, room):
    hurt(lab, room); finished(lab, room, kill=lambda *a: dict(before=skips_a_batch))
    bad = ' '.join(L.differences(lab.whole, room)); assert 'phase_a: order' in bad and 'newest' in bad and "'step')" in bad

def writes_at_once():
    "Every file is written where it shall be, as a beginner would"
    import deepfake_nb.pack as p
    def naive(path, write): Path(path).parent.mkdir(parents=True, exist_ok=True); write(Path(path)); return Path(path)
    old = p.atomic_write
    for m in [m for n,m in sys.modules.items() if n.startswith('deepfake_nb')]:
        for k,v in list(vars(m).items()):
            if v is old: setattr(m, k, naive)

def test_a_naive_write_is_caught(lab, room):
    "The card of the best weights is torn, and nobody can read it any more"
    a = lab.start(room, A, die_at=(1, r'_best\.json'), torn=True, before=writes_at_once); assert a.killed
    with pytest.raises(AssertionError, match='JSONDecodeError|cannot be read|can.t be read'): finished(lab, room, kill=lambda *a: dict(before=writes_at_once))

# ---- the other accidents

def says(a, *words):
    "It ended in an error, in these words"
    assert a.error and all(w in a.error for w in words), a.error or a.metrics

class Disk:
    "A disk of its own at `folder`, of so many kilobytes. Who may not mount one gets a limit to the size of files, and folders without the right to write"
    def __init__(self, folder, kilobytes): self.folder,self.kb,self.mounted = folder,kilobytes,False
    def _mount(self, *options): return subprocess.run(['mount','-o',f'{",".join(options)},size={self.kb}k', *(('-t','tmpfs','none') if not self.mounted else ()), self.folder], capture_output=True).returncode==0
    def __enter__(self): self.folder.mkdir(parents=True); self.mounted = not os.geteuid() and self._mount('rw'); return self
    def __exit__(self, *_): self.mounted and subprocess.run(['umount',self.folder], check=True)
    def grow(self, kilobytes): self.kb = kilobytes; assert not self.mounted or self._mount('remount')
    def limit(self): self.mounted or resource.setrlimit(resource.RLIMIT_FSIZE, (self.kb*200,)*2) # what the disk could hold, roughly
    def lock(self, shut):
        if self.mounted: assert self._mount('remount', 'ro' if shut else 'rw')
        else: [p.chmod(0o555 if shut else 0o755) for p in (self.folder, *self.folder.rglob('*')) if p.is_dir() and not p.is_symlink()]

def test_full_disk(lab):
    "Too small for the shards, then for a second checkpoint: refused with a remedy; once there is room, the same plan"
    with Disk(lab.root/'full disk'/'home', 700) as disk:
        r = lab.room('full disk'); more = dict(before=disk.limit)
        says(lab.start(r, 0, **more), 'the store cannot be written', 'Remedy: free or remount its disk'); disk.grow(20_000)
        lab.run('', room=r, upto=1, kill=lambda *a: more)
        says(lab.start(r, A, **more), 'CheckpointError', *(('Could be deleted here','larger disk') if disk.mounted else ('Free or remount the disk',))); disk.grow(60_000)
        finished(lab, r); same(lab, r)

def test_read_only_disk(lab):
    "As after an error of the disk, in the middle of Phase A"
    with Disk(lab.root/'read only'/'home', 60_000) as disk:
        r = lab.after('read only', 1); f = hurt(lab, r); disk.lock(True)
        says(lab.start(r, 0), 'the store cannot be written', 'Remedy: free or remount its disk')
        says(lab.start(r, A), str(f.parent)); disk.lock(False)
        finished(lab, r); same(lab, r)

def test_the_newest_checkpoint_is_damaged(lab, room):
    f = hurt(lab, room, 4); newest = latest(f); b = bytearray(newest.weights.read_bytes()); b[len(b)//2] ^= 1; newest.weights.write_bytes(b)
    finished(lab, room); same(lab, room)
    assert room.ends[A].metrics['resumed']<newest.step and any(f'checkpoint {newest.stem} passed over' in r.get('said', '') for r in read_rows(room.ends[A].run))

def test_a_shard_is_cut_short(lab, room):
    "Training names it and says what to do, and that is enough: the stage before makes it anew"
    z = sorted((room.home/'store').rglob('*.zip'))[1]; z.write_bytes(z.read_bytes()[:-1000])
    says(lab.start(room, A), z.name, 'Remedy: delete this file and prepare again')
    room.ends.clear(); lab.run('', room=room, upto=A+1); same(lab, room)
    assert room.ends[0].metrics['reused']==len(L.FILMS)-1

def one_worker(lab, room, i, rows):
    "A `watch` that kills one of the stage's own workers, and lets the stage be"
    due,hit = L.after_row(lab.next_run(room, i), rows, 0),[]
    def watch(pid):
        if hit or not due(pid): return
        workers = [w for server in psutil.Process(pid).children() for w in server.children()]
        if workers: max(workers, key=lambda w: w.create_time()).kill(); hit.append(1)
    return watch

def test_a_loader_worker_is_killed(lab, room):
    says(lab.start(room, A, dict(workers=1), watch=one_worker(lab, room, A, 2)), 'WorkerError', 'take fewer workers than 1', 'Run again')
    finished(lab, room); same(lab, room); assert room.ends[A].metrics['resumed']>0

def test_a_worker_that_cuts_faces_is_killed(lab):
    r = lab.room('cutter')
    says(lab.start(r, 0, dict(workers=2), watch=one_worker(lab, r, 0, 1)), 'a process that cuts faces was ended from outside', 'take fewer workers than 2')
    lab.run('', room=r, upto=1); same(lab, r); assert r.ends[0].metrics['reused']>0

def poisoned(step):
    "The loss of this step is no number, as after a batch with a zero where none may be"
    def before():
        import deepfake_nb.losses as l
        real,n = l.stf_loss,[0]
        def loss(*a, **kw):
            n[0] += 1; out = real(*a, **kw)
            return out|dict(loss=out['loss']*float('nan')) if n[0]==step else out
        l.stf_loss = loss
    return before

def test_a_loss_that_is_no_number(lab, room):
    "It stops before the step is taken and says where; what was kept is good, and from there the same plan"
    says(lab.start(room, A, before=poisoned(3)), 'the loss of step 3 is nan', 'The last good checkpoint is step 2', 'cursor 2')
    f = next((room.home/'checkpoints').glob('phase_a-*')); assert latest(f).step==2
    finished(lab, room); same(lab, room); assert room.ends[A].metrics['resumed']==2

def test_a_learning_rate_that_explodes(lab, room):
    says(lab.start(room, A, dict(lr=1e30)), 'the loss of step 2 is nan; the step was not taken', 'The last good checkpoint is step 1', 'Lower lr', 'cursor 1')

def jumping():
    "A wall clock that is right, then eleven days ahead, then four months behind, again and again: put in wherever this code has taken `time.time`"
    real,n,put = time.time,itertools.count(),[]
    def wall(): return real()+(0, 10**6, -10**7)[next(n)//3%3]
    for m in [m for n,m in sys.modules.items() if n.startswith('deepfake_nb')]:
        for f in [f for v in list(vars(m).values()) for f in (v, *(vars(v).values() if isinstance(v, type) else ()))]:
            if real in (d := getattr(f, '__defaults__', None) or ()): f.__defaults__ = tuple(wall if x is real else x for x in d); put.append(f)
    time.time = wall; assert len(put)>=2 # budget and journal

def test_the_clock_jumps(lab, room):
    "And the files are of a day that has not come"
    hurt(lab, room)
    for p in (room.home/'checkpoints').rglob('*'): os.utime(p, (time.time()+10**6,)*2)
    finished(lab, room, kill=lambda *a: dict(before=jumping)); same(lab, room)
    times = [r['time'] for r in read_rows(room.ends[A].run)]; assert max(times)-min(times)>9*10**5
    assert room.ends[A].metrics['spent']<.05 and room.ends[A].metrics['reason']=='steps'

# ---- through the real runner and papermill

RUN = 'import sys,json; from deepfake_nb.runs import run_stage; sys.exit(run_stage(sys.argv[1], json.loads(sys.argv[2]), runs=sys.argv[3], grace=5).exit_code)'

def runner(lab, room):
    "A runner in a process of its own that trains Phase A; it and its record's folder"
    known = set((room.folder/'runs').glob('*')) if (room.folder/'runs').exists() else set()
    p = subprocess.Popen([sys.executable,'-c',RUN,notebook('phase_a'),json.dumps(lab.parameters(A, room.ends)),room.folder/'runs'], cwd=L.ROOT, env=os.environ|L.environment(room.home), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return p,wait_for(lambda: p.poll() is not None or [f for f in set((room.folder/'runs').glob('*'))-known if (f/'run.json').exists()])[0]

def kernel(p, run): return next(q for q in _family(run) if 'ipykernel' in ' '.join(q.cmdline()))
def papermill(p, run): return next(q for q in _family(run) if q.ppid()==p.pid)
def itself(p, run): return psutil.Process(p.pid)

@pytest.mark.parametrize('victim', [kernel,papermill,itself][:3 if SOAK else 1])
@pytest.mark.parametrize('turn', range(max(1, SOAK//50)))
def test_killed_under_papermill(lab, room, victim, turn):
    "The record says so, nothing is left that runs, and the next start ends as if nothing had been"
    p,run = runner(lab, room); rows = random.Random(f'{SEED} {victim.__name__} {turn}').randint(1, 6)
    wait_for(lambda: p.poll() is not None or (run/'metrics.jsonl').exists() and len(read_rows(run))>=rows, 120); assert p.poll() is None
    victim(p, run).kill(); p.wait(120)
    if victim is itself: # the orphans are not told: they go on, keep the lease, and end by themselves
        assert Record.load(run)['status']=='running'; wait_for(lambda: not _family(run), 120)
    else: assert Record.load(run).state=='killed' and _family(run)==[] and p.returncode==137
    p,again = runner(lab, room); assert p.wait(180)==0, Record.load(again)['reason']
    room.attempts += [L.Attempt('phase_a', True, 0, run=run), a := L.Attempt('phase_a', False, 0, metrics=last_words(Record.load(again)), run=again)]
    room.ends.append(a); same(lab, room)
