"Two processes on one CPU: the same training as one with twice the batch; a lost rank; no orphans; only rank 0 writes"
import itertools,os,signal,subprocess,sys,time
from dataclasses import replace
from pathlib import Path
import psutil,pytest,torch
from common import wait_for
from deepfake_nb.checkpoints import latest
from deepfake_nb.ranks import RankError
from deepfake_nb.training import TrainConfig,by_epochs,train
from test_training import Points,Toy,evaluate,loss_fn
import test_resume

torch.set_num_threads(1)
HERE = Path(__file__).parent
store = test_resume.store

def loader(workers=0, batches=6, size=8):
    def make(epoch, first): return torch.utils.data.DataLoader(Points(10_000*epoch+first*size, (batches-first)*size), batch_sampler=torch.utils.data.BatchSampler(range((batches-first)*size), size, False), num_workers=workers)
    return by_epochs(make, batches)

CFG = TrainConfig(steps=20, lr=.02, warmup=4, eval_every=7, save_every=5, device='cpu')

class Still(Toy):
    "Without dropout: its random numbers are drawn by each rank for itself"
    def __init__(self): super().__init__(); self.net[3].p = 0.; self.net[1] = torch.nn.Identity()

def go(folder, world=1, loss=loss_fn, cfg=CFG, model=Still, **kw):
    m = model(); return m,train(m, loader(), loss, cfg, evaluate=evaluate, folder=folder, world=world, progress=False, **kw)

def alike(a, b, eps=1e-6):
    (m,h),(n,g) = a,b
    assert max(abs(x-y) for x,y in zip(h.losses, g.losses, strict=True))<eps
    assert max((x-y).abs().max().item() for x,y in zip(m.state_dict().values(), n.state_dict().values(), strict=True) if x.is_floating_point())<eps

def test_two_are_one_with_twice_the_batches(tmp_path):
    two,one = go(tmp_path/'two', 2),go(tmp_path/'one', cfg=replace(CFG, accumulate=2))
    alike(one, two); assert len(two[1].ranks)==2 and two[1].evals[-1][0]==20
    assert latest(tmp_path/'two').manifest['cursor']==40 and {p.suffix for p in (tmp_path/'two').iterdir()}=={'.json','.pt','.safetensors'}

def test_the_real_network_on_real_pairs(store, tmp_path):
    "STF-Mamba without dropout, forged pairs, augmentation: steps of two ranks against one that accumulates twice"
    old = test_resume.CFG
    try:
        test_resume.CFG = replace(old, steps=3, accumulate=2, warmup=1); one = test_resume.go(store, tmp_path/'one', still=True)
        test_resume.CFG = replace(old, steps=3, accumulate=1, warmup=1); two = test_resume.go(store, tmp_path/'two', world=2, still=True)
    finally: test_resume.CFG = old
    alike(one, two)

def killed_rank(at):
    "A loss whose rank 1 ends itself in batch `at`"
    seen = itertools.count(1)
    def loss(m, b):
        if torch.distributed.is_initialized() and torch.distributed.get_rank()==1 and next(seen)==at: os.kill(os.getpid(), signal.SIGKILL)
        return loss_fn(m, b)
    return loss

def test_a_lost_rank_loses_nothing(tmp_path):
    "With dropout and batch norm: each rank's random numbers are in the checkpoint"
    whole = go(tmp_path/'whole', 2, model=Toy)
    with pytest.raises(RankError, match='rank 1 was ended by SIGKILL'): go(tmp_path/'lost', 2, loss=killed_rank(13), model=Toy)
    assert latest(tmp_path/'lost').step==10 and not (tmp_path/'lost'/'lease').exists()
    again = go(tmp_path/'lost', 2, model=Toy); assert again[1].resumed==10
    for a,b in zip(whole[0].state_dict().values(), again[0].state_dict().values()): assert torch.equal(a, b)
    assert (again[1].losses, again[1].order)==(whole[1].losses, whole[1].order)

def test_a_nan_on_one_rank_stops_all(tmp_path):
    def loss(m, b):
        out = loss_fn(m, b)
        if torch.distributed.get_rank()==1: out['loss'] = out['loss']*float('nan')
        return out
    with pytest.raises(RankError, match='rank 1 ended with exit code 1: .*the loss of step 1 is nan'): go(tmp_path, 2, loss=loss)
    assert latest(tmp_path).step==0

def test_no_rank_outlives_a_killed_kernel(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_ranks as t, time, pathlib\ndef loss(m, b): pathlib.Path({str(tmp_path)!r}, str(t.os.getpid())).touch(); time.sleep(.2); return t.loss_fn(m, b)\nt.go(None, 2, loss=loss)"
    p = subprocess.Popen([sys.executable,'-c',code], cwd=HERE.parent)
    pids = wait_for(lambda: (f := [int(x.name) for x in tmp_path.iterdir()]) if len(list(tmp_path.iterdir()))==2 else None)
    p.kill(); p.wait()
    wait_for(lambda: not any(psutil.pid_exists(i) and psutil.Process(i).status()!='zombie' for i in pids if i!=p.pid), 10)

def test_a_signal_to_the_first_stops_all_in_good_order(tmp_path):
    def ends(cursor, step=1):
        for i,b in zip(itertools.count(cursor, step), loader()(cursor, step)):
            if i==12: os.kill(os.getpid(), signal.SIGTERM)
            yield b
    m = Toy(); h = train(m, ends, loss_fn, CFG, folder=tmp_path, world=2, progress=False)
    assert h.reason=='signal' and latest(tmp_path).step==h.steps[-1]==7
