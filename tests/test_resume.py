"A real training on forged pairs, killed at a step and taken up with another number of workers: weights, metrics, order of the data"
import os,signal,subprocess,sys
from pathlib import Path
import pytest,timm,torch
from dataclasses import replace
from deepfake_nb.batches import PairDataset
from deepfake_nb.checkpoints import latest
from deepfake_nb.clips import FaceStore
from deepfake_nb.device_forge import after_codec
from deepfake_nb.evaluation import judge_pairs
from deepfake_nb.journal import Journal
from deepfake_nb.losses import stf_loss
from deepfake_nb.presets import find_videos,settings
from deepfake_nb.stf_mamba import build_stf_mamba
from deepfake_nb.stores import build_store
from deepfake_nb.training import pair_epochs,train

torch.set_num_threads(1)
HERE = Path(__file__).parent
CFG = settings('tiny', steps=9, epoch=6, # the end of an epoch, step 6, is a checkpoint
               eval_every=3, eval_pairs=2)

@pytest.fixture(scope='module')
def store(tmp_path_factory): return build_store(find_videos().where(name=['woman','carphone']), tmp_path_factory.mktemp('faces'), size=96, spans=2, span=12).folder

def go(store, folder=None, workers=0, killed_at=0, world=1, still=False, **more):
    "Phase A as its notebook does it; `killed_at`: the process ends itself inside this batch"
    cfg,seen = replace(CFG, workers=workers),[]
    def pairs(who, seed): return PairDataset(FaceStore(store), [who], cfg.length, seed=seed, qp=cfg.qp)
    def loss(m, b):
        seen.append(1)
        if len(seen)==killed_at: os.kill(os.getpid(), signal.SIGKILL)
        b = after_codec(b, 0); return stf_loss(m(b.frames), b.label, b.pair, m.cfg.hll_loss, cfg.hll_weight)
    torch.manual_seed(0); model = build_stf_mamba(cfg.model, cfg.weights)
    for d in model.modules():
        if still and isinstance(d, (torch.nn.Dropout,timm.layers.DropPath)): d.p = d.drop_prob = 0.
    h = train(model, pair_epochs(pairs('woman', 0), cfg), loss, replace(cfg.training(0), device='cpu', average=.5), evaluate=lambda m: judge_pairs(m, pairs('carman', 7), cfg.eval_pairs, 'cpu'), folder=folder, progress=False, world=world, journal=Journal(''), **more)
    return model,h

def ends(store, folder, **kw):
    "The same in a process of its own; returns how it ended"
    code = f'import sys; sys.path.insert(0, {str(HERE)!r}); import test_resume as t; t.go({str(store)!r}, {str(folder)!r}, **{kw!r})'
    return subprocess.run([sys.executable,'-c',code], cwd=HERE.parent).returncode

@pytest.fixture(scope='module')
def whole(store): return go(store)

def same(a, b):
    (m,h),(n,g) = a,b
    for k,x in m.state_dict().items(): assert torch.equal(x, n.state_dict()[k]), k
    assert (g.losses, g.norms, g.lrs, g.evals, g.order)==(h.losses, h.norms, h.lrs, h.evals, h.order)

@pytest.mark.parametrize('workers,then', [(0,2), (1,0), (2,4), (4,1)])
def test_killed_and_taken_up_with_other_workers(store, whole, tmp_path, workers, then):
    assert ends(store, tmp_path, workers=workers, killed_at=8)==-9
    got = go(store, tmp_path, then)
    assert got[1].resumed==6 and 'taken over' in got[1].said[0]
    same(whole, got)

