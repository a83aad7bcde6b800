"The forge under fire: clips of any kind give a pair that is really forged or a clear error; the same bytes anywhere; repeated frames break nothing. SOAK=N repeats the counts N times."
import hashlib,json,os,subprocess,sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import cv2,numpy as np,pytest,torch
from deepfake_nb.batches import PairDataset,collate,pair_loader
from deepfake_nb.blend import BlendError,SBIConfig,VideoSBI,effect,self_blend,draw_blend
from deepfake_nb.stores import build_store
from deepfake_nb.damage import RateDraw
from deepfake_nb.manifest import pack_manifest
from deepfake_nb.losses import stf_loss
from deepfake_nb.stf_mamba import STFConfig,build_stf_mamba
from deepfake_nb.video import VideoError

SEED = 20264
ENV = os.environ|dict(PYTHONPATH=str(Path(__file__).parents[1]))

@pytest.fixture(scope='module')
def store(tmp_path_factory): return build_store(pack_manifest(['woman','man','carphone']), tmp_path_factory.mktemp('faces'), size=112).store()

@pytest.fixture(scope='module')
def clip(store):
    t = next(t for t in store.tracks if t.group=='woman')
    return store.read(t.key, 60, 12)

def mangled(clip, rng):
    "A clip to which something happened that happens to clips; what it was"
    f,l,t = clip.frames.copy(),clip.landmarks.copy(),clip.times; S = f.shape[1]
    what = str(rng.choice(['nothing','one colour','noise','dark','nan','far nan','border','profile','tiny','odd','grey','short','float','huge values']))
    if what=='one colour': f[:] = rng.integers(256)
    if what=='noise': f = rng.integers(0, 256, f.shape, np.uint8)
    if what=='dark': f = f//40
    if what=='nan': l[rng.integers(len(l), size=2), rng.integers(468)] = np.nan
    if what=='far nan': l[3:9] = np.nan
    if what=='border': l += np.float32(rng.uniform(-S, S, 2))
    if what=='profile': l[...,0] = l[...,0].mean()+(l[...,0]-l[...,0].mean())*np.float32(rng.uniform(.01, .5))
    if what=='tiny': l = l.mean((1,2), keepdims=True)+(l-l.mean((1,2), keepdims=True))*np.float32(rng.uniform(.01, .3))
    if what=='odd': h,w = rng.integers(60, S, 2)|1; f = f[:,:h,:w]
    if what=='grey': f = f[...,0] if rng.random()<.5 else f[...,:1]
    if what=='short': n = int(rng.integers(0, 8)); f,l,t = f[:n],l[:n],t[:n]
    if what=='float': f = f.astype(np.float32)/255
    if what=='huge values': l = l*np.float32(1e6)
    return what,SimpleNamespace(frames=f, landmarks=l, times=t)

def test_a_forged_pair_or_a_clear_error(clip):
    "Never a real clip with the label fake, never another exception"
    n,seen = 70*int(os.environ.get('SOAK') or 1),{}
    for i in range(n):
        rng = np.random.default_rng([SEED, i]); what,c = mangled(clip, rng); sbi = VideoSBI(length=8, codec=bool(i%3==0), look=False)
        try: p = sbi(c, i)
        except (BlendError, VideoError) as e: seen.setdefault(what, []).append(type(e).__name__); assert len(str(e))>20; continue
        seen.setdefault(what, []).append('pair')
        assert p.real.shape==p.fake.shape and p.mask.shape==p.real.shape[:3] and p.mask.max()==255 and np.isfinite(p.drift).all()
        if not i%3==0: inside,outside = effect(p.real, p.fake, p.mask); assert inside>=sbi.cfg.least*.5 and outside==0 # half: repeated frames weigh twice
    print({k:{r:v.count(r) for r in set(v)} for k,v in sorted(seen.items())})
    assert set(seen['nothing'])=={'pair'} # the others are drawn often enough to be there, and none of these can be forged:
    for k in ('grey','short','float','far nan','huge values'): assert seen[k] and 'pair' not in seen[k], k

def print_of(pair): return hashlib.sha256(b''.join(np.ascontiguousarray(getattr(pair, k)).tobytes() for k in ('real','fake','mask','landmarks','times','drift'))).hexdigest()

def test_the_same_bytes_in_another_process(store, clip):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_forge import *
from deepfake_nb.clips import FaceStore
s = FaceStore({str(store.folder)!r}, shards={store.shards!r}); t = next(t for t in s.tracks if t.group=='woman'); c = s.read(t.key, 60, 12)
print([print_of(VideoSBI()(c, i)) for i in range(6)])"""
    other = subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
    ours = [print_of(VideoSBI()(clip, i)) for i in range(6)]
    assert json.loads(other.replace("'", '"'))==ours and len(set(ours))==6

def test_clocks_are_the_same_for_any_number_of_workers(store):
    ds = PairDataset(store, ['woman','carman'], 6, rate=1.)
    prints = lambda workers: [hashlib.sha256(b.frames.numpy().tobytes()+b.times.numpy().tobytes()).hexdigest() for b in pair_loader(ds, 2, 8, workers=workers)]
    assert prints(0)==prints(2)

def test_outside_of_the_mask_nothing_differs_for_any_draw(clip):
    for s in range(60*int(os.environ.get('SOAK') or 1)):
        d = draw_blend(np.random.default_rng(s), SBIConfig(blends=('alpha','poisson','pyramid'), balance=bool(s%2)))
        b = self_blend(clip.frames[:4], clip.landmarks[:4], d)
        assert (b.fake[b.mask==0]==b.real[b.mask==0]).all(), d.json()

@pytest.mark.parametrize('phase', ['a','b'])
def test_repeated_frames_break_nothing_downstream(store, phase):
    "Two, or all, frames exactly equal: scores, loss and gradients stay finite"
    ds = PairDataset(store, ['woman','carman'], 8, rate=0., codec=False); batch = collate([ds[0,i] for i in range(2)])
    torch.manual_seed(0); model = build_stf_mamba(getattr(STFConfig, f'phase_{phase}')('tiny'), 'random')
    for index in ([0,0,2,2,4,5,5,7], [0]*8):
        frames = batch.frames[:,index,:,8:104,8:104]; model.zero_grad()
        loss = stf_loss(model(frames), batch.label, batch.pair, model.cfg.hll_loss, .1)['loss']; loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert torch.isfinite(loss) and grads and all(torch.isfinite(g).all() for g in grads)
        assert torch.isfinite(model.eval().score(frames)).all(); model.train()

def test_a_pair_keeps_its_true_times(store):
    ds = PairDataset(store, ['woman'], 8, rate=1.)
    for i in range(12):
        item = ds[0,i]; t = item['times'].numpy(); track = store[item['key']]
        steps = np.diff(t)*track.rate
        assert (steps>-1e-6).all() and np.allclose(steps, steps.round(), atol=.2) # whole frames apart, repeated ones not at all
        twice = np.flatnonzero(steps.round()==0)
        assert all((item['mask'][k]==item['mask'][k+1]).all() for k in twice)
