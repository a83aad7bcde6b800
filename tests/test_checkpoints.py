"Checkpoints under kill -9, damage, a full disk and a folder that can't be written; leases under a race. SOAK=N for the long count."
import os,random,resource,shutil,signal,tempfile,time
from pathlib import Path
import pytest,torch
from torch import nn
from deepfake_nb import checkpoints as ck
from deepfake_nb.checkpoints import CheckpointError,Lease,latest,load_checkpoint,save_checkpoint,save_weights,tidy,damage

torch.set_num_threads(1)
SOAK = int(os.environ.get('SOAK', 0))

class Toy(nn.Module):
    "A model whose every number is the step it was saved at"
    def __init__(self, n=300_000): super().__init__(); self.cfg = dict(n=n); self.w,self.b = nn.Parameter(torch.zeros(n)),nn.Parameter(torch.zeros(3))

def at(step, n=300_000):
    m = Toy(n)
    with torch.no_grad(): [p.fill_(step) for p in m.parameters()]
    return m,dict(cursor=step, moments=torch.full((2,n), float(step)))

def save(folder, step, n=300_000): m,s = at(step, n); return save_checkpoint(folder, step, m, s)

def check(folder):
    "The newest sound checkpoint is whole: weights, state and manifest of one step; returns the step"
    found = latest(folder); m = Toy(found.manifest['config']['n']); s = load_checkpoint(found, m)
    assert {p.item() for w in m.parameters() for p in w.unique()}=={float(found.step)}
    assert s['cursor']==found.step and (s['moments']==found.step).all()
    return found.step

def fork(f):
    "Run `f` in a process of its own; it ends there"
    if pid := os.fork(): return pid
    code = 1
    try: code = f() or 0
    finally: os._exit(code)

def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def saver(folder, done):
    "Save step after step until killed; `done` is told of each save that returned"
    found = latest(folder); step = found.step if found else 0
    tidy(folder)
    while True: step += 1; save(folder, step); os.write(done, b'%d\n' % step)

def test_kill_during_saves(tmp_path, capsys):
    n,seed = SOAK or 6,0
    rng,good,debris,told = random.Random(seed),0,0,0
    for _ in range(n):
        r,w = os.pipe(); pid = fork(lambda: saver(tmp_path, w)); os.close(w)
        assert os.read(r, 100)
        time.sleep(rng.uniform(0, .15)); os.kill(pid, signal.SIGKILL); assert ended(pid)==-9
        os.set_blocking(r, False)
        try: told = max(told, *[int(x) for x in os.read(r, 10**6).split()], 0, 0)
        except BlockingIOError: pass
        os.close(r)
        good += check(tmp_path)>=told
        names = {p.suffix for p in tmp_path.iterdir()}; manifests = list(tmp_path.glob('*.json'))
        debris += '.part' in names or len(list(tmp_path.glob('*.safetensors')))>len(manifests)
        assert sum(not damage(tmp_path, p.stem) for p in manifests)>=1
    with capsys.disabled(): print(f'\nkill -9 during saves: {good} of {n} resumable at the last step reported (seed {seed}; {debris} kills left debris)')
    assert good==n

def dying(k, f):
    "Do `f` in a process that ends at its `k`-th file operation"
    count = [0]
    def wrap(g):
        def h(*a, **kw):
            count[0] += 1
            if count[0]==k: os._exit(9)
            return g(*a, **kw)
        return h
    def go():
        for name in ('replace','fsync','open','link'): setattr(os, name, wrap(getattr(os, name)))
        for name in ('unlink','write_bytes'): setattr(Path, name, wrap(getattr(Path, name)))
        f(); return 0
    return ended(fork(go))

def test_kill_at_every_operation(tmp_path):
    "The process ends at the 1st, 2nd, ... file operation of a save: something sound is there each time"
    k = 0
    save(tmp_path/'old', 10, 100); save(tmp_path/'old', 20, 100)
    found = []
    while True:
        k += 1; shutil.rmtree(tmp_path/'now', ignore_errors=True); shutil.copytree(tmp_path/'old', tmp_path/'now')
        code = dying(k, lambda: save(tmp_path/'now', 30, 100))
        found.append(check(tmp_path/'now'))
        if code==0: break
        assert code==9
        tidy(tmp_path/'now'); save(tmp_path/'now', 40, 100); assert check(tmp_path/'now')==40
    assert found==sorted(found) and set(found)=={20,30} and k>15

@pytest.mark.parametrize('suffix', ['.json','.safetensors','.pt'])
@pytest.mark.parametrize('how', ['flip','cut','empty','gone'])
def test_damaged_newest_falls_back(tmp_path, suffix, how):
    save(tmp_path, 10, 1000); p = save(tmp_path, 20, 1000).with_suffix(suffix)
    data = bytearray(p.read_bytes()); data[len(data)//2] ^= 128
    if how=='flip': p.write_bytes(data)
    if how=='cut': p.write_bytes(data[:len(data)//2])
    if how=='empty': p.write_bytes(b'')
    if how=='gone': p.unlink()
    assert check(tmp_path)==10
    assert bool(latest(tmp_path).said)==(not (how=='gone' and suffix=='.json'))
    save(tmp_path, 30, 1000); save(tmp_path, 40, 1000)
    assert check(tmp_path)==40

def test_the_sound_one_outlives_damaged_ones(tmp_path):
    save(tmp_path, 10, 100)
    for step in (20, 30): p = save(tmp_path, step, 100); p.with_suffix('.pt').write_bytes(b'x')
    assert check(tmp_path)==10

def test_all_damaged_is_an_error(tmp_path):
    for p in (save(tmp_path, 10, 100), save(tmp_path, 20, 100)): p.with_suffix('.pt').write_bytes(b'x')
    with pytest.raises(CheckpointError, match='no checkpoint in it is sound'): latest(tmp_path)

def test_full_disk(tmp_path):
    "The operating system refuses to write beyond 1 MB; the old ones stay and nothing is left behind"
    save(tmp_path, 10, 1000); save(tmp_path, 20, 1000)
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        try: save(tmp_path, 30)
        except CheckpointError as e: return 7 if 'cannot be written' in str(e) and 'older checkpoints are untouched' in str(e) else 1
    assert ended(fork(full))==7
    assert check(tmp_path)==20 and not list(tmp_path.glob('.*part'))
    save(tmp_path, 40, 1000); assert check(tmp_path)==40

def test_read_only_folder():
    folder = Path(tempfile.mkdtemp()); folder.chmod(0o755); save(folder, 10, 100); folder.chmod(0o555)
    def forbidden():
        if os.geteuid()==0: os.setuid(65534)
        try: save(folder, 20, 100)
        except CheckpointError as e: return 7 if 'cannot be written' in str(e) else 1
    try: assert ended(fork(forbidden))==7 and check(folder)==10
    finally: folder.chmod(0o755); shutil.rmtree(folder)

def test_named_weights_survive_a_kill(tmp_path):
    "Replacing a named model: at every moment the old one or the new one, never a card with other weights"
    ck.MODELS['Toy'] = lambda c: Toy(**c)
    save_weights(tmp_path/'old', 'best', at(1, 100)[0])
    for k in range(1, 30):
        shutil.rmtree(tmp_path/'now', ignore_errors=True); shutil.copytree(tmp_path/'old', tmp_path/'now')
        code = dying(k, lambda: save_weights(tmp_path/'now', 'best', at(2, 100)[0]))
        got = ck.load_model(tmp_path/'now', 'best').w.unique().tolist()
        assert got in ([1.],[2.])
        if code==0: break
    assert code==0 and got==[2.] and k>4

def contend(folder, n, stale):
    "`n` processes ask for one lease at the same moment; how many got it"
    r,w = os.pipe(); gate_r,gate_w = os.pipe(); stay_r,stay_w = os.pipe()
    def ask():
        os.close(gate_w); os.close(stay_w); os.read(gate_r, 1)
        try: Lease(folder/'lease', stale=stale).acquire(); os.write(w, b'y')
        except CheckpointError: os.write(w, b'n')
        os.read(stay_r, 1)
    pids = [fork(ask) for _ in range(n)]
    os.close(gate_r); os.close(stay_r); os.close(gate_w)
    answers = b''
    while len(answers)<n: answers += os.read(r, n)
    os.close(stay_w); [ended(p) for p in pids]
    return answers.count(b'y')

def test_one_of_many_gets_a_new_lease(tmp_path):
    for i in range(SOAK or 5): f = tmp_path/str(i); f.mkdir(); assert contend(f, 6, 600)==1

def test_one_of_many_takes_a_stale_lease(tmp_path):
    for i in range(SOAK or 5):
        f = tmp_path/str(i); f.mkdir(); old = Lease(f/'lease', 'old').acquire(); os.utime(f/'lease', (time.time()-1000,)*2)
        assert contend(f, 6, 600)==1
        with pytest.raises(CheckpointError, match='lost to another process'): old.renew()

def test_two_leases(tmp_path):
    a,b = Lease(tmp_path/'lease', 'a').acquire(),Lease(tmp_path/'lease', 'b')
    with pytest.raises(CheckpointError, match='held by a'): b.acquire()
    a.release(); b.acquire(); assert b.said==''
    a.release(); assert (tmp_path/'lease').exists()
    b.renew(); b.release(); assert not (tmp_path/'lease').exists()

def test_lease_of_a_killed_process_is_free_at_once(tmp_path):
    r,w = os.pipe()
    def hold(): Lease(tmp_path/'lease', 'killed').acquire(); os.write(w, b'y'); time.sleep(60)
    pid = fork(hold); os.read(r, 1)
    with pytest.raises(CheckpointError, match='held by killed'): Lease(tmp_path/'lease').acquire()
    os.kill(pid, signal.SIGKILL); time.sleep(.1)
    with Lease(tmp_path/'lease', 'next') as lease: assert 'is gone' in lease.said
    ended(pid)

@pytest.mark.parametrize('before', ['nothing','stale','dead'])
def test_a_kill_while_a_lease_is_taken_leaves_it_free(tmp_path, before):
    "At the 1st, 2nd, ... file operation of taking a lease: the next process gets it at once"
    for k in range(1, 40):
        f = tmp_path/str(k); f.mkdir()
        if before=='stale': Lease(f/'lease').acquire(); os.utime(f/'lease', (1, 1))
        if before=='dead': ended(fork(lambda: Lease(f/'lease').acquire() and 0))
        code = dying(k, lambda: Lease(f/'lease').acquire())
        with Lease(f/'lease'): pass
        assert not (f/'lease').exists() and all(p.name=='lease.taking' or p.suffix in ('.tmp','.part') for p in f.iterdir())
        if code==0: break
    assert code==0 and k>3
