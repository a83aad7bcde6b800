"A sweep that is killed and goes on, with the same numbers; encoders that read nothing but the film; damages that stay on the codec's grid for any patch; dlib, where it is installed"
import hashlib,importlib.util,os,signal,subprocess,sys
import numpy as np,pandas as pd,pytest,torch
from dataclasses import replace
from deepfake_nb.balance import Position
from deepfake_nb.batches import gather
from deepfake_nb.clips import Clip
from deepfake_nb.manifest import pack_manifest
from deepfake_nb.robustness import SETTINGS,RobustnessError,middle,read_scores,settings_for,sweep,sweep_clips
from deepfake_nb.specialists.base import SpecialistConfig
from deepfake_nb.specialists.examples import BlendedCouples
from deepfake_nb.specialists.team import build_specialist
from deepfake_nb.stores import build_store
from common import count,ended,fork,told,wait_for

SWEPT = [SETTINGS[k] for k in ('undamaged','blur 7 1.167','noise 0.1','JPEG 20','gamma 2','low light 0.25','frame rate 2','dropped 0.2','crop margin 0.8','H.264 30')]
ON_DISK = ['seconds','shared'] # what may differ between two sweeps

class Restless:
    "How much a clip changes from frame to frame, as a probability"
    name,length,extras,sha256 = 'restless',8,(),'0'*64
    asked = 0
    def __call__(self, b): self.asked += len(b); return torch.sigmoid(b.frames.float().diff(dim=1).abs().mean((1,2,3,4))-3),torch.zeros(len(b), dtype=torch.bool)

class Specialist:
    "A specialist as chapter 20 builds it, untrained: it reads what the trained one reads"
    def __init__(self, code):
        torch.manual_seed(0); self.model = build_specialist(SpecialistConfig(code, 'tf_efficientnet_lite0', width=64, heads=4), 'pack').eval(); n = self.model.module.needs
        self.name,self.length,self.extras,self.sha256 = code,n.frames,n.extras,hashlib.sha256(code.encode()).hexdigest()
    @torch.inference_mode()
    def __call__(self, b): a = self.model(b); return a.score,a.abstains

@pytest.fixture(scope='module')
def couples(tmp_path_factory):
    "Real clips of the pack and their self-blends, with native pixels"
    torch.set_num_threads(1)
    store = build_store(pack_manifest(['man','carphone']), tmp_path_factory.mktemp('store'), native=True, spans=2, span=24).store()
    ds = BlendedCouples(store, {t.group for t in store.tracks}, 12, seed=1, native=True)
    return store,[c for i in range(3) for c in ds[Position('', 0, i)][1:3]]

def noise_clips(n=6, T=12, native=(112,96)):
    "Clips of nobody: what a sweep does with them takes no time"
    rng,M = np.random.default_rng(0),np.tile(np.array([[.45,0,4],[0,.4,4]], np.float32), (T,1,1))
    for i in range(n):
        x = rng.integers(0, 256, (T,*native,3), dtype=np.uint8)
        yield Clip(rng.integers(0, 256, (T,224,224,3), dtype=np.uint8), rng.uniform(20, 200, (T,468,2)).astype(np.float32), np.arange(T)/25, None, f'd/m/c/v{i//2}#0', f'g{i//2}', 0, i%2,
            x, np.tile(np.array([16,24]), (T,1)), np.tile(np.float32([20,28,100,108]), (T,1)), M, np.ones(T, np.float32))

def test_a_killed_sweep_goes_on(tmp_path):
    "SIGKILL after a few settings: what is on disk is whole, what is missing is done, and the numbers are those of a sweep that nobody disturbed"
    clips = list(noise_clips()); whole = sweep([Restless()], clips, tmp_path/'whole', SWEPT, show=False, n=100); seed = int(os.environ.get('SEED', 0)); rng = np.random.default_rng(seed)
    for turn in range(n := count(3)):
        folder,stop = tmp_path/f'{turn}',int(rng.integers(1, len(SWEPT)-1))
        def go():
            torch.set_num_threads(1); sweep([Restless()], clips, folder, SWEPT, show=False, n=100)
        pid = fork(go); wait_for(lambda: len(list(folder.glob('*.json')))>=stop); os.kill(pid, signal.SIGKILL)
        assert ended(pid)==-signal.SIGKILL
        done = {p.name:p.read_bytes() for p in folder.glob('*.json')}; assert stop<=len(done)<len(SWEPT)
        d = Restless(); table = sweep([d], clips, folder, SWEPT, show=False, n=100)
        assert d.asked==len(clips)*(len(SWEPT)-len(done)) # no setting twice, none left out
        assert all((folder/k).read_bytes()==v for k,v in done.items())
        pd.testing.assert_frame_equal(table.drop(columns=ON_DISK), whole.drop(columns=ON_DISK))
    told(turn+1, n, 'killed sweeps that went on to the same numbers', seed)

def test_a_file_of_something_else_is_an_error(tmp_path):
    clips = list(noise_clips(2)); sweep([Restless()], clips, tmp_path, SWEPT[:2], show=False, n=50)
    one = sorted(tmp_path.glob('*.json'))[0]; good = one.read_text()
    for text,why in ((good[:len(good)//2], 'no JSON'), ('[]', 'no result of this sweep'), (good.replace('0'*64, '1'*64), 'made of other detector'), (good.replace('"seed": 0', '"seed": 5'), 'different seed')):
        one.write_text(text)
        with pytest.raises(RobustnessError, match=why) as e: sweep([Restless()], clips, tmp_path, SWEPT[:2], show=False)
        assert 'Remedy' in str(e.value)
    one.write_text(good); assert len(sweep([Restless()], clips, tmp_path, SWEPT[:3], show=False, n=50))==3

def test_more_settings_and_detectors_join_a_folder(tmp_path, couples):
    "Native and crop, one frame and sixteen, in one sweep; what was scored alone is not scored again"
    clips = couples[1]; cm = Specialist('CM'); some = SWEPT[:4]
    a = sweep([cm], clips, tmp_path, some, show=False, n=50); r = Restless(); b = sweep([cm,r], clips, tmp_path, some, show=False, n=50)
    pd.testing.assert_frame_equal(b[b.detector=='CM'].reset_index(drop=True), a); assert r.asked==len(clips)*len(some)
    rows = read_scores(tmp_path); assert set(rows.pixels)=={'native'} and rows.key[rows.label==1].str.contains('self-blended').all() and not rows.key[rows.label==0].str.contains('self-blended').any()
    hit = rows[rows.detector=='CM'].pivot(index=['key','start'], columns='setting', values='score'); assert (hit['JPEG 20']!=hit.undamaged).any() # it did see the damage
    with pytest.raises(RobustnessError, match='looks at 16 frames'): sweep([Specialist('TM')], clips, tmp_path/'tm', some, show=False)

def test_a_couple_shares_its_draw_and_nothing_leaves_the_grid(couples):
    "All settings that can be had, on reals and fakes of the pack: same size, same grid, same draw for both of a couple"
    pairs = list(zip(couples[1][::2], couples[1][1::2])); can = [d for d in settings_for('all') if 'dlib' not in d.needs and (not d.lost or d.lost<.3)]; n = min(count(30), len(can)); some = [can[i] for i in np.linspace(0, len(can)-1, n).astype(int)]
    for d in some:
        for real,fake in pairs[:1]:
            a,b = d(real),d(fake); assert not (a.native_offset%8).any() and a.native.shape[1:]==real.native.shape[1:] and a.frames.shape[1:]==real.frames.shape[1:] and a.label==0 and b.label==1
            assert len(a.frames)==len(a.times)==len(a.landmarks)==len(a.transforms)>=8; same = replace(fake, native=real.native, frames=real.frames)
            assert (d(same).frames==a.frames).all() and (d(same).native==a.native).all() # only the pixels tell the two apart
    told(len(some), n, 'settings on the grid, alike for a couple', 0)

RUBBISH = '''
import hashlib,numpy as np
from deepfake_nb.video import recompress
x = np.random.default_rng(0).integers(0, 256, (2,45,52,3)).repeat(8, 1).repeat(8, 2).astype(np.uint8); x = np.concatenate([np.roll(x, i, 2) for i in range(8)])
print(hashlib.sha256(b''.join(recompress(x, codec=c, **k)[0].tobytes() for c in ('h264','hevc','vp9') for k in (dict(crf=23), dict(crf=35), dict(qp=30)))).hexdigest())
'''
def test_encoders_read_only_the_film():
    "Fresh memory full of rubbish: the same bytes"
    runs = [subprocess.run([sys.executable, '-c', RUBBISH], env=os.environ|dict(MALLOC_PERTURB_=p), capture_output=True, text=True, check=True).stdout for p in ('0','1','165')]
    assert len(set(runs))==1 and len(runs[0].strip())==64

def test_choice_and_middle(couples):
    store = couples[0]
    with pytest.raises(RobustnessError, match='no fake track'): sweep_clips(store, 12)
    c = couples[1][0]; m = middle(c, 5); assert (m.times==c.times[3:8]).all() and (m.native==c.native[3:8]).all()
    assert gather([(0, m)], ('native','mask')).frames.shape==(1,5,3,224,224)

def test_dlib_cuts_where_it_is_installed(couples, tmp_path):
    "With dlib: a crop of nearly our size. Without: a row without a number, and the reason"
    clips = couples[1]; t = sweep([Restless()], clips, tmp_path, settings_for('cropper'), show=False, n=50).set_index('setting')
    if importlib.util.find_spec('dlib') is None: assert t.note['cropper dlib']=='dlib is not installed' and np.isnan(t.auc['cropper dlib']) and t.n['cropper dlib']==0; return
    big = max(clips, key=lambda c: c.native.shape[1]); x = SETTINGS['cropper dlib'](big); assert x.presence.mean()>.5
    assert .7<np.median((np.linalg.det(x.transforms[:,:,:2])/np.linalg.det(big.transforms[:,:,:2]))**.5)<1.4
