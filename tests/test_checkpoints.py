"Checkpoints under kill -9, damage, a full disk, a folder that can't be written and files from a stranger; many under one limit; leases under a race. SOAK=N for the long count."
import hashlib,io,json,os,pickle,random,resource,shutil,signal,struct,subprocess,sys,tempfile,time,zipfile
from pathlib import Path
import numpy as np,pytest,torch
from torch import nn
from common import count,wait_for,ended,fork
from deepfake_nb import checkpoints as ck
from deepfake_nb.checkpoints import CheckpointError,Lease,latest,load_checkpoint,save_checkpoint,save_weights,tidy,damage
from deepfake_nb.optimizers import AdamW8bit
from deepfake_nb.pack import read_json
from deepfake_nb.shelf import Shelf,export_model,finished,mark_finished,retire,storage

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

# what is on the disk, and what is not

def test_forced_to_the_disk(tmp_path, monkeypatch):
    "Each file is synced before it gets its name, and its folder after"
    log,real = [],dict(fsync=os.fsync, replace=os.replace)
    monkeypatch.setattr(os, 'fsync', lambda fd: (log.append(('sync', Path(os.readlink(f'/proc/self/fd/{fd}')).name)), real['fsync'](fd)))
    monkeypatch.setattr(os, 'replace', lambda a,b: (log.append(('name', Path(b).name)), real['replace'](a, b)))
    p = save(tmp_path, 10, 100); stem = p.stem
    assert [k for k,_ in log]==['sync','name','sync']*3
    assert [n for k,n in log if k=='name']==[f'{stem}.safetensors',f'{stem}.pt',f'{stem}.json']
    assert [n for _,n in log[2::3]]==[tmp_path.name]*3 and all(n.endswith('.part') for _,n in log[0::3])

@pytest.fixture
def disk(tmp_path):
    "A file system of its own, 4 MB"
    d = tmp_path/'disk'; d.mkdir(); r = subprocess.run(['mount','-t','tmpfs','-o','size=4m','none',d], capture_output=True, text=True)
    if r.returncode: pytest.skip(f'no file system can be mounted here: {r.stderr.strip()}')
    yield d
    subprocess.run(['umount',d], check=True)

N = 100_000 # 1.2 MB a checkpoint

def test_refused_before_the_first_byte(disk):
    "Two lie there, a third does not fit: no file is begun, and what the error offers to delete makes room"
    save(disk/'m', 10, N); save(disk/'m', 20, N); before,at = sorted(os.listdir(disk/'m')),(disk/'m').stat().st_mtime_ns
    with pytest.raises(CheckpointError, match='nothing was written') as e: save(disk/'m', 30, N)
    free = shutil.disk_usage(disk).free; said = str(e.value)
    assert str(disk/'m') in said and f'{free:,} are free' in said and '000001-step00000010 (1,2' in said and 'step00000020 (' not in said
    need = int(said.split(' bytes are needed')[0].split()[-1].replace(',', '')); assert 12*N < need < 12*N+20_000 and free-need < ck.MARGIN
    assert sorted(os.listdir(disk/'m'))==before and (disk/'m').stat().st_mtime_ns==at and check(disk/'m')==20
    ck.drop(disk/'m', '000001-step00000010'); save(disk/'m', 30, N); assert check(disk/'m')==30

def test_debris_is_named(disk):
    save(disk/'m', 10, N); (disk/'m'/'000002-step00000020.pt').write_bytes(bytes(1_500_000))
    with pytest.raises(CheckpointError, match=r'000002-step00000020.pt \(1,500,000 bytes\)'): save(disk/'m', 30, N)
    tidy(disk/'m'); save(disk/'m', 30, N); assert check(disk/'m')==30

def test_disk_fills_between_the_question_and_the_write(disk, monkeypatch):
    save(disk/'m', 10, N); real = ck.room
    def fill_up(folder, need): free = real(folder, need); (disk/'other').write_bytes(bytes(free-N*6)); return free
    monkeypatch.setattr(ck, 'room', fill_up)
    with pytest.raises(CheckpointError, match='cannot be written .No space left on device.'): save(disk/'m', 20, N)
    monkeypatch.setattr(ck, 'room', real); (disk/'other').unlink()
    assert check(disk/'m')==10 and not list((disk/'m').glob('.*'))
    assert [p.suffix for p in (disk/'m').glob('000002-*')]==['.safetensors']
    tidy(disk/'m'); save(disk/'m', 20, N); assert check(disk/'m')==20

@pytest.mark.parametrize('bits', [32, 8])
def test_estimate(tmp_path, bits):
    "What a training asks for at its start is enough for what it writes, and not much more"
    net = nn.Sequential(nn.Conv2d(3, 64, 7), nn.BatchNorm2d(64), nn.Conv2d(64, 256, 5), nn.Linear(900, 700)); net[0].requires_grad_(False)
    opt = {32:torch.optim.AdamW, 8:AdamW8bit}[bits](p for p in net.parameters() if p.requires_grad)
    for p in net.parameters(): p.grad = torch.ones_like(p) if p.requires_grad else None
    opt.step(); p = save_checkpoint(tmp_path, 1, net, dict(optimizer=opt.state_dict()), config={})
    true = sum(f.stat().st_size for f in tmp_path.iterdir()); assert p.exists()
    assert true < ck.estimate(net, bits=bits) < 1.05*true

# one shelf

def held(root): return sum(p.stat().st_size for p in root.rglob('*-step*'))

def over(root, model, shelf, step=30):
    "A training from its first save to its mark"
    f = root/model
    for s in (10, 20, step): save_checkpoint(f, s, *at(s, 1000), shelf=shelf)
    save_weights(f, 'best', at(step, 1000)[0]); mark_finished(f, 'best', history=[.5,.25]); return f

def test_savers_at_one_moment_keep_the_limit(tmp_path):
    "Four processes, room for two: two save, two are told who holds what"
    one = held(save(tmp_path/'one', 1, 1000).parent)
    for i in range(count(4)):
        root = tmp_path/str(i); root.mkdir(); r,w = os.pipe(); gate_r,gate_w = os.pipe()
        def go(m):
            os.close(gate_w); os.read(gate_r, 1)
            try: save_checkpoint(root/m, 1, *at(1, 1000), shelf=Shelf(root, int(2.5*one))); os.write(w, b'y')
            except CheckpointError as e: os.write(w, b'n' if 'nothing was written, nothing deleted' in str(e) else b'?')
        pids = [fork(lambda m=m: go(m)) for m in 'abcd']; os.close(gate_r); os.close(gate_w)
        assert [ended(p) for p in pids]==[0]*4 and sorted(os.read(r, 9))==list(b'nnyy')
        os.close(r); os.close(w); assert held(root)==2*one

def test_kill_at_every_operation_of_giving_way(tmp_path):
    "The finished one is whole or retired, never half told; the next process is not in its way"
    ck.MODELS['Toy'] = lambda c: Toy(**c); one = held(save(tmp_path/'one', 1, 1000).parent)
    old = tmp_path/'old'; over(old, 'a', None); save(old/'b', 10, 1000); gone = set()
    for k in range(1, 99):
        now = tmp_path/'now'; shutil.rmtree(now, ignore_errors=True); shutil.copytree(old, now)
        def go(): save_checkpoint(now/'b', 20, *at(20, 1000), shelf=Shelf(now, int(3.5*one)))
        code = dying(k, go)
        assert finished(now/'a')['history']==[.5,.25] and ck.load_model(now/'a', 'best').w.unique().tolist()==[30.] and check(now/'b') in (10, 20)
        gone.add(latest(now/'a') is None and held(now/'a')==0)
        with Lease(now/'a'/'lease'): pass
        tidy(now/'a'); tidy(now/'b'); save_checkpoint(now/'b', 30, *at(30, 1000), shelf=Shelf(now, int(3.5*one)))
        assert check(now/'b')==30 and held(now) <= 3.5*one
        if code==0: break
    assert code==0 and k>25 and gone=={True,False}

def test_oldest_first_and_no_more_than_needed(tmp_path):
    one = held(save(tmp_path/'one', 1, 1000).parent); root = tmp_path/'r'
    for i,m in enumerate('cab'): over(root, m, None); os.utime(root/m/'finished.json', (1000+i, 1000+i))
    s = Shelf(root, int(5.5*one)); save_checkpoint(root/'d', 1, *at(1, 1000), shelf=s)
    assert [x.split()[0] for x in s.said]==['c'] and '6 checkpoints' not in s.said[0] and [latest(root/m) is None for m in 'abc']==[False,False,True]
    assert [(r['model'],r['checkpoints'],r['kept'],r['finished']) for r in storage(root)]==[('a',2,1,1),('b',2,1,1),('c',0,1,1),('d',1,0,0)]

def test_damaged_weights_keep_the_checkpoints(tmp_path):
    "The only thing left of a training is not deleted for another one"
    one = held(save(tmp_path/'one', 1, 1000).parent); root = tmp_path/'r'; over(root, 'a', None); w = next((root/'a').glob('best-*')); w.write_bytes(w.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match='a stays, best: best-.* has .* bytes'): save_checkpoint(root/'b', 1, *at(1, 1000), shelf=Shelf(root, int(2.5*one)))
    assert check(root/'a')==30 and not (root/'b').exists()
    with pytest.raises(CheckpointError, match='must stay'): retire(root/'a')

def test_counting_while_others_delete(tmp_path):
    "Chunks come and go in one folder while somebody else asks who holds what and whether there is room"
    def come_and_go():
        while True: over(tmp_path, 'a/chunk', None); shutil.rmtree(tmp_path/'a'/'chunk')
    (tmp_path/'a').mkdir(); pid,seen = fork(come_and_go),set()
    try:
        wait_for(lambda: storage(tmp_path)[0]['checkpoints'])
        for _ in range(100*count(10)): seen.add(storage(tmp_path)[0]['checkpoints']); Shelf(tmp_path, 0).yielding(10**9, tmp_path/'b')
    finally: os.kill(pid, signal.SIGKILL); ended(pid)
    assert len(seen)>2

@pytest.mark.parametrize('which', ['BG','RR'])
def test_a_specialist_travels(tmp_path, which):
    "Exported here, loaded by a process that has nothing but the folder; weights and card, nothing pickled. Counting its numbers on the meta device leaves no module of ours with a tensor there"
    from deepfake_nb.specialists.base import SpecialistConfig
    from deepfake_nb.specialists.team import build_specialist
    torch.manual_seed(0); m = build_specialist(SpecialistConfig(which, backbone='test_efficientnet', width=64), 'random')
    save_weights(tmp_path/'here', 'stage_1', m, extra=dict(stage=1)); export_model(tmp_path/'here', 'stage_1', tmp_path/'out'); shutil.rmtree(tmp_path/'here'); (tmp_path/'out').rename(tmp_path/'there')
    code = "import hashlib; from deepfake_nb.checkpoints import *; m = load_model('there'); print(type(m).__name__, m.card['extra'], hashlib.sha256(weights_bytes(m)).hexdigest()); import sys,torch; print([(n,k) for n,x in sys.modules.items() if n.startswith('deepfake_nb') for k,v in vars(x).items() if isinstance(v, torch.Tensor) and v.is_meta])"
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert out==['Specialist', "{'stage':", '1}', hashlib.sha256(ck.weights_bytes(m)).hexdigest(),'[]']
    assert sorted(os.listdir(tmp_path/'there'))==['card.json','model.safetensors']

# files from a stranger

OPENED = []
sys.addaudithook(lambda event,args: OPENED.append(str(args[0])) if event=='open' else None)

class Order:
    "Pickles as an order to make a folder"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir,(self.path,)

class Numpy:
    "The same, dressed as an array that is put together again"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return np.load,(io.BytesIO(pickle.dumps(Order(self.path), 2)),None,True)

def pickled(obj, **kw): b = io.BytesIO(); torch.save(obj, b, **kw); return b.getvalue()

def repacked(data, edit, how=zipfile.ZIP_STORED):
    "A state with its parts edited"
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as a, zipfile.ZipFile(out, 'w', how) as b:
        for i in a.infolist(): b.writestr(i.filename, edit(i.filename, a.read(i)))
    return out.getvalue()

def larger(data, n, more):
    "A state whose tensor says it has `more` numbers and not `n`"
    a,b = (b'J'+struct.pack('<i', x) for x in (n, more))
    return repacked(data, lambda name,part: part.replace(a, b) if name.endswith('data.pkl') else part)

def forged(folder, suffix, data, **lies):
    "A checkpoint that was saved, with one file replaced and the manifest made right again"
    p = save(folder, 10, 1000); card = read_json(p)
    if data is not None: (f := p.with_suffix(suffix)).write_bytes(data); card['files'][f.name] = dict(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    p.write_text(json.dumps(card|lies)); return p

ARMED = dict(state=lambda o: pickled(dict(cursor=10, optimizer=o)), array=lambda o: pickled(dict(a=np.array([o], dtype=object))), old_format=lambda o: pickled(dict(a=o), _use_new_zipfile_serialization=False),
             plain=lambda o: pickle.dumps(o, 2), plain_newest=lambda o: pickle.dumps(o, 5), key=lambda o: pickled({('a',o):1}))

@pytest.mark.parametrize('order', [Order, Numpy])
@pytest.mark.parametrize('how', ARMED)
def test_a_state_runs_nothing(tmp_path, how, order):
    "The hashes are right; the loader alone stands between the file and the order. Loaded carelessly, it is carried out"
    mark = tmp_path/'it ran'; p = forged(tmp_path/'m', '.pt', ARMED[how](order(mark)))
    try: torch.load(p.with_suffix('.pt'), weights_only=False)
    except (RuntimeError, TypeError): pass
    assert mark.exists(); mark.rmdir()
    assert not damage(tmp_path/'m', p.stem) and latest(tmp_path/'m').step==10
    with pytest.raises(CheckpointError, match='cannot be read|without running') as e: load_checkpoint(tmp_path/'m', Toy(1000))
    assert not mark.exists() and p.stem in str(e.value) and 'somebody you trust' in str(e.value) and 'weights_only' not in str(e.value)

BIG = pickled(dict(cursor=10, w=torch.zeros(100_000)))
HARM = dict(packed=repacked(BIG, lambda n,p: p, zipfile.ZIP_DEFLATED), bomb=repacked(BIG, lambda n,p: bytes(3*10**7) if n.endswith('data/0') else p, zipfile.ZIP_DEFLATED), says_more=larger(BIG, 100_000, 2**30), says_less=larger(BIG, 100_000, 90_000),
            cut=BIG[:-30], empty=b'', a_list=pickled([1]), text=b'hello', no_pickle=repacked(BIG, lambda n,p: b'' if n.endswith('pkl') else p))

@pytest.mark.parametrize('how', HARM)
def test_a_state_does_no_other_harm(tmp_path, how):
    p = forged(tmp_path, '.pt', HARM[how]); m = Toy(1000); before = m.w.clone()
    with pytest.raises(CheckpointError, match=p.stem): load_checkpoint(tmp_path, m)
    assert torch.equal(m.w, before)

def liars():
    good = ck.weights_bytes(at(10, 1000)[0]); n = struct.unpack('<Q', good[:8])[0]; head,body = json.loads(good[8:8+n]),good[8+n:]; a,b = 'w','b'
    def st(head, body=body): h = json.dumps(head).encode(); return struct.pack('<Q', len(h))+h+body
    return dict(length=struct.pack('<Q', 2**63)+good[8:], header_past_the_end=struct.pack('<Q', len(good))+good[8:], overlap=st(head|{a:head[a]|dict(data_offsets=[0,4000]), b:head[b]|dict(data_offsets=[0,12])}), beyond=st(head|{a:head[a]|dict(shape=[10**11], data_offsets=[0,4*10**11])}),
                shape=st(head|{a:head[a]|dict(shape=[10**9])}), overflow=st(head|{a:head[a]|dict(shape=[2**62,2**62])}), kind=st(head|{a:head[a]|dict(dtype='PY')}), negative=st(head|{a:head[a]|dict(data_offsets=[-4,4000])}),
                hole=st(head, body+bytes(64)), pickle=pickle.dumps(head), empty=b'', deep=struct.pack('<Q', 10**5)+b'['*10**5)

@pytest.mark.parametrize('how', liars())
def test_weights_that_lie(tmp_path, how):
    p = forged(tmp_path, '.safetensors', liars()[how])
    with pytest.raises(CheckpointError, match='no sound file of safetensors.*Take it again') as e: load_checkpoint(tmp_path, Toy(1000))
    assert p.with_suffix('.safetensors').name in str(e.value)

@pytest.mark.parametrize('how', ['up','root','link','linked manifest','folder','dots','null','list','number','short','other','text','huge','deep','no model','model','settings'])
def test_manifests_are_looked_at_first(tmp_path, how):
    "Whatever a manifest names, nothing outside of its folder is opened, and the older sound one is found"
    secret = tmp_path/'secret'; secret.write_text('x'); true = dict(bytes=1, sha256=hashlib.sha256(b'x').hexdigest()); f = tmp_path/'m'
    save(f, 5, 1000); p = forged(f, '', None); card = read_json(p); files,pt = card['files'],p.with_suffix('.pt')
    lie = {'up':dict(files=files|{'../secret':true}), 'root':dict(files=files|{str(secret):true}), 'folder':dict(files={'.':true}), 'dots':dict(files={'..':true}), 'null':dict(files={'a\\0':true}), 'list':dict(files=[true]), 'number':dict(files=7),
           'short':dict(files={pt.name:files[pt.name]}), 'other':dict(step=99), 'text':dict(files={k:v|dict(bytes=str(v['bytes'])) for k,v in files.items()}), 'no model':dict(model=None), 'model':dict(model=['STFMamba']), 'settings':dict(config='rm -rf')}.get(how)
    if lie: p.write_text(json.dumps(card|lie))
    if how=='link': pt.rename(secret); pt.symlink_to(secret)
    if how=='linked manifest': secret.write_text(p.read_text()); p.unlink(); p.symlink_to(secret)
    if how=='huge': p.write_text(json.dumps(card|dict(extra='x'*ck.LARGEST)))
    if how=='deep': p.write_text('['*10**5)
    OPENED.clear(); found = latest(f)
    assert found.step==5 and len(found.said)==1 and not [o for o in OPENED if o.startswith(str(tmp_path)) and (Path(o).resolve().parent!=f or Path(o).is_symlink())]
    OPENED.clear(); shutil.rmtree(f/'x', ignore_errors=True); [q.unlink() for q in f.glob('000001*')]
    with pytest.raises(CheckpointError, match='no checkpoint in it is sound'): load_checkpoint(f, Toy(1000))
    assert str(secret) not in OPENED

@pytest.mark.parametrize('name', ['../secret.safetensors','/secret.safetensors','x/../../secret.safetensors','link.safetensors','secret.pt'])
def test_cards_name_files_beside_them(tmp_path, name):
    "The same of weights that have a name; size and hash are those of the file outside"
    ck.MODELS['Toy'],f = lambda c: Toy(**c),tmp_path/'m'; p = save_weights(f, 'best', at(1, 100)[0]); (f/'x').mkdir()
    secret = tmp_path/('secret'+Path(name).suffix); next(f.glob('best-*')).rename(secret); (f/'link.safetensors').symlink_to(secret); shutil.copy(secret, f/'secret.pt')
    card = read_json(p); card['files'] = {f'{tmp_path}{name}' if name[0]=='/' else name:next(iter(card['files'].values()))}; p.write_text(json.dumps(card))
    OPENED.clear()
    with pytest.raises(CheckpointError, match='not beside it|is a link|one file of safetensors'): ck.load_model(f, 'best')
    assert not [o for o in OPENED if 'secret' in o or 'link' in o]

@pytest.mark.parametrize('model,config,words', [('Resnet', {}, 'no known model'), ('os.system', {'command':'true'}, 'no known model'), ('STFMamba', {'__reduce__':'os.system'}, 'no STFMamba can be built'), ('STFMamba', {'backbone':'hf-hub:someone/else'}, 'no such model'),
    ('STFMamba', {'mixer':'__import__("os")'}, 'no STFMamba can be built'), ('STFMamba', {'width':-1}, 'no STFMamba can be built'), ('Specialist', {'code':'../BG'}, 'no Specialist can be built'), ('Specialist', {}, 'no Specialist can be built'), ('Toy', {'n':'1000'}, 'no Toy can be built')])
def test_settings_that_name_code(tmp_path, model, config, words):
    ck.MODELS['Toy'] = lambda c: Toy(**c)
    p = save_weights(tmp_path, 'best', at(1, 100)[0]); p.write_text(json.dumps(read_json(p)|dict(model=model, config=config)))
    with pytest.raises(CheckpointError, match=words) as e: ck.load_model(tmp_path, 'best')
    assert 'best-' in str(e.value)

def test_an_old_torch_is_refused(tmp_path, monkeypatch):
    save(tmp_path, 10, 100); assert check(tmp_path)==10
    for v,ok in (('2.9.1', False), ('2.5.0+cu121', False), ('2.10.0', True), ('2.14.1+cu130', True), ('3.0', True)):
        monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion(v))
        if ok: load_checkpoint(tmp_path)
        else:
            with pytest.raises(CheckpointError, match='CVE-2026-24747.*Install torch 2.10'): load_checkpoint(tmp_path)

def spoilt(rng, data):
    "A few bytes of a file changed, cut or doubled"
    b = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        i = rng.randrange(len(b)); kind = rng.randrange(4)
        if kind==0: b[i] = rng.randrange(256)
        if kind==1: b[i] ^= 1<<rng.randrange(8)
        if kind==2: del b[i:i+rng.randrange(1, 9)]
        if kind==3: b[i:i] = b[i:i+rng.randrange(1, 9)]
    return bytes(b)

def test_any_damage_is_an_error_of_ours(tmp_path):
    "Random bytes in state, pickle, weights and manifest, hashes made right: read or refused by name, never anything else"
    ck.MODELS['Toy'] = lambda c: Toy(**c); rng,n,refused = random.Random(0),count(300),0
    m,s = at(10, 5); opt = torch.optim.AdamW(m.parameters()); m.w.grad = torch.ones(5); opt.step(); s |= dict(optimizer=opt.state_dict(), rng=torch.get_rng_state()[:40], words=['a',None,(1.5,{2})])
    p = save_checkpoint(tmp_path, 10, m, s); card = read_json(p); good = {x:p.with_suffix(x).read_bytes() for x in ('.pt','.safetensors','.json')}
    for i in range(n):
        kind = ('.pt','pickle','.safetensors','.json')[i%4]; x = '.pt' if kind=='pickle' else kind
        data = repacked(good['.pt'], lambda name,part: spoilt(rng, part) if name.endswith('data.pkl') else part) if kind=='pickle' else spoilt(rng, good[kind])
        for y,d in good.items(): p.with_suffix(y).write_bytes(d)
        p.with_suffix(x).write_bytes(data)
        if x!='.json': p.write_text(json.dumps(card|dict(files=card['files']|{p.with_suffix(x).name:dict(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())})))
        try:
            if found := latest(tmp_path): load_checkpoint(found); ck.load_model(tmp_path)
        except CheckpointError as e: refused += 1; assert e.remedy and str(tmp_path) in str(e)
    assert refused > n/3
