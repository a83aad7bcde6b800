"Resuming after kill -9 and SIGTERM, with and without loader workers; the live figure in a real kernel; bf16 on a GPU. SOAK=N for the long count."
import itertools,os,random,signal,subprocess,sys,time
from pathlib import Path
import pytest,torch,torch.nn.functional as F
from torch import nn
from deepfake_nb.checkpoints import latest
from deepfake_nb.journal import Journal
from deepfake_nb.pack import read_json
from deepfake_nb.training import TrainConfig,by_epochs,train

torch.set_num_threads(1)
SOAK = int(os.environ.get('SOAK', 0))
HERE = Path(__file__).parent

class Toy(nn.Module):
    def __init__(self):
        super().__init__(); torch.manual_seed(0); self.cfg = {}
        self.net = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(.2), nn.Linear(32, 2))
    def forward(self, x): return self.net(x)

class Points(torch.utils.data.Dataset):
    "A pure function of the index"
    def __init__(self, first, n): self.first,self.n = first,n
    def __len__(self): return self.n
    def __getitem__(self, i): x = torch.randn(2, generator=torch.Generator().manual_seed(self.first+i)); return x,int(x.prod()>0)

def loader(workers=0, batches=6, size=8):
    "Epochs of six batches, from a DataLoader"
    def make(epoch, first):
        ds = Points(10_000*epoch+first*size, (batches-first)*size)
        return torch.utils.data.DataLoader(ds, size, num_workers=workers)
    return by_epochs(make, batches)

def loss_fn(model, b): return dict(loss=F.cross_entropy(model(b[0]), b[1]))
def evaluate(model): torch.rand(3); return dict(auc=float(model(torch.ones(4, 2)).softmax(1)[0,1]))
CFG = TrainConfig(steps=40, lr=.02, warmup=4, eval_every=7, save_minutes=1e-9, device='cpu')

def go(folder=None, loader_fn=None, cfg=CFG, **kw):
    m = Toy(); h = train(m, loader_fn or loader(), loss_fn, cfg, evaluate=evaluate, folder=folder, progress=False, **kw)
    return m,h

def same(a, b): return all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

def stuck(at, flag):
    "A loader that hangs before batch `at` and says so"
    def loader_fn(cursor):
        for i,b in zip(itertools.count(cursor), loader()(cursor)):
            if i==at: Path(flag).touch(); time.sleep(600)
            yield b
    return loader_fn

def test_kill_a_real_process_and_resume(tmp_path):
    "20 + kill -9 + 20 are the bits of 40"
    whole,h = go()
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_training as t; t.go({str(tmp_path/'ck')!r}, t.stuck(20, {str(tmp_path/'flag')!r}))"
    p = subprocess.Popen([sys.executable, '-c', code], cwd=HERE.parent)
    while not (tmp_path/'flag').exists(): assert p.poll() is None; time.sleep(.05)
    p.kill(); assert p.wait()==-9
    assert latest(tmp_path/'ck').step==20
    torch.manual_seed(123); m,h2 = go(tmp_path/'ck')
    assert h2.resumed==20 and 'taken over' in h2.said[0]
    assert same(m, whole) and h2.losses==h.losses and h2.evals==h.evals and h2.norms==h.norms

def test_random_kills(tmp_path, capsys):
    "Killed at random moments until it ends by itself: still the same bits"
    whole,_ = go(); n,seed,good,kills = SOAK or 3,1,0,0
    rng = random.Random(seed)
    def forked(folder):
        if pid := os.fork(): return pid
        code = 1
        try: go(folder); code = 0
        finally: os._exit(code)
    start = time.perf_counter(); pid = forked(tmp_path/'whole')
    while not (end := os.waitpid(pid, os.WNOHANG))[0]: assert time.perf_counter()-start<60, 'a forked child hangs'; time.sleep(.01)
    assert end[1]==0
    most = max(.5, 1.3*(time.perf_counter()-start)) # s: a child of a large process on a busy machine is slow to begin, and must have a chance to get on
    for i in range(n):
        while True:
            pid = forked(tmp_path/str(i)); time.sleep(rng.uniform(.1, 1)*most); os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]); assert code in (0, -9)
            kills += code==-9
            if (f := latest(tmp_path/str(i))) and f.step==40: break
        m,h = go(tmp_path/str(i)); good += same(m, whole)
    with capsys.disabled(): print(f'\nkill -9 during training: {good} of {n} end with the bits of an unbroken run (seed {seed}; {kills} kills)')
    assert good==n

@pytest.mark.parametrize('first,second', [(0,0), (2,0), (0,2)])
def test_resume_in_the_middle_of_an_epoch_with_workers(tmp_path, first, second):
    whole,_ = go()
    def ends(cursor):
        for i,b in zip(itertools.count(cursor), loader(first)(cursor)):
            if i==15: os.kill(os.getpid(), signal.SIGINT)
            yield b
    before = signal.getsignal(signal.SIGINT)
    _,h = go(tmp_path, ends); assert (h.reason, h.steps[-1])==('signal', 16) and signal.getsignal(signal.SIGINT) is before
    m,_ = go(tmp_path, loader(second)); assert same(m, whole)

def test_sigterm_from_outside(tmp_path):
    if not (pid := os.fork()):
        code = 1
        try: _,h = go(tmp_path/'ck', stuck(20, tmp_path/'flag'), journal=Journal(tmp_path/'run')); code = 5 if h.reason=='signal' else 1
        finally: os._exit(code)
    while not (tmp_path/'flag').exists(): time.sleep(.02)
    os.kill(pid, signal.SIGTERM); time.sleep(.2); os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])==1
    assert read_json(tmp_path/'run'/'status.json')['state']=='failed' and latest(tmp_path/'ck').step==20

def test_the_folder_is_given_back_after_an_error(tmp_path):
    def broken(model, b): raise RuntimeError('out of memory')
    with pytest.raises(RuntimeError): train(Toy(), loader(), broken, CFG, folder=tmp_path/'ck', progress=False, journal=Journal(tmp_path/'run'))
    assert not (tmp_path/'ck'/'lease').exists()
    assert 'out of memory' in read_json(tmp_path/'run'/'status.json')['error']
    assert go(tmp_path/'ck')[1].reason=='steps'

def test_damaged_newest_is_passed_over_and_the_end_is_the_same(tmp_path):
    whole,_ = go()
    def ends(cursor):
        for i,b in zip(itertools.count(cursor), loader()(cursor)):
            if i==20: os.kill(os.getpid(), signal.SIGTERM)
            yield b
    go(tmp_path, ends); f = latest(tmp_path); b = bytearray(f.weights.read_bytes()); b[-1] ^= 1; f.weights.write_bytes(bytes(b))
    m,h = go(tmp_path); assert h.resumed==20 and 'passed over' in ' '.join(h.said) and same(m, whole)

def test_two_trainings_of_one_folder(tmp_path):
    def second(model, b):
        with pytest.raises(Exception, match='held by training Toy'): go(tmp_path)
        return loss_fn(model, b)
    train(Toy(), loader(), second, TrainConfig(steps=1, device='cpu'), folder=tmp_path, progress=False)

def test_live_figure_in_a_real_kernel():
    "Three updates, one output, and it is the last"
    import nbformat
    from nbclient import NotebookClient
    code = ['from deepfake_nb.journal import LiveFigure\nclass H: pass\nlive = LiveFigure(every=0)',
            'for n in (2, 5, 9):\n    h = H(); h.steps,h.losses,h.evals = list(range(n)),list(range(n)),[(0,dict(auc=.5))]; live.update(h)',
            'import base64; print(base64.b64encode(live.png).decode())']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in code])
    NotebookClient(nb, timeout=300, kernel_name='python3', resources={'metadata':{'path':str(HERE.parent)}}).execute()
    images = [o for c in nb.cells for o in c.outputs if 'image/png' in o.get('data', {})]
    assert len(images)==1 and images[0]['data']['image/png'].replace('\n', '').strip()==nb.cells[2].outputs[0]['text'].strip()

def test_the_bar_is_quiet_where_nobody_watches(capfd):
    train(Toy(), loader(), loss_fn, TrainConfig(steps=30, device='cpu'))
    assert capfd.readouterr().err.count('\r')<=3

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_bf16_on_a_gpu(tmp_path):
    seen = []
    def loss(model, b): out = model(b[0]); seen.append(out.dtype); return dict(loss=F.cross_entropy(out.float(), b[1]))
    m = Toy(); cfg = TrainConfig(steps=40, lr=.02, warmup=4)
    h = train(m, loader(), loss, cfg, folder=tmp_path, progress=False)
    assert h.precision=='bf16' and set(seen)=={torch.bfloat16} and h.losses[-1]<h.losses[0]
    assert {p.dtype for p in m.parameters()}=={torch.float32} and latest(tmp_path).step==40
