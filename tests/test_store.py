"The face store under fire: writers killed at any moment, shards damaged anywhere, workers in processes of their own. SOAK=N repeats each count N times and prints 'N of N'."
import json,os,signal,subprocess,sys,time
from pathlib import Path
from types import SimpleNamespace
import numpy as np,pytest
from deepfake_nb.clips import ARRAYS,FaceStore,ShardWriter,StoreError,open_shard

from common import count,told

SEED = 20260
ENV = os.environ|dict(PYTHONPATH=str(Path(__file__).parents[1]))

def synthetic(T=24, size=64, seed=0, native=False):
    "A track that needs neither a video nor a face: the store does not look at faces"
    rng = np.random.default_rng(seed)
    y,x = np.mgrid[:size,:size]; t = np.arange(T)[:,None,None]
    base = 128+60*np.sin(x/9+t/5)+50*np.cos(y/7-t/6)
    crops = np.clip(base[...,None]+rng.normal(0, 4, (T,size,size,3)), 0, 255).astype(np.uint8)
    return SimpleNamespace(crops=crops, landmarks=rng.random((T,468,2), np.float32)*size, boxes=rng.random((T,4), np.float32), transforms=rng.random((T,2,3), np.float32),
        times=np.arange(T)/25, presence=np.ones(T, np.float32), start=0, source='synthetic', margin=1.5,
        native=crops if native else None, native_offset=np.zeros((T,2), np.int64) if native else None)

def write(path, seed=0, **kw):
    with ShardWriter(path, seed=seed) as out:
        for n in range(2): out.add(synthetic(seed=seed*2+n, **kw), 'd/real/as_is/v', 'anna', sound=np.random.default_rng(seed).random(20000, np.float32)-.5)

def forked(work):
    "Run `work` in a forked child; its pid"
    if not (pid := os.fork()):
        try: work()
        finally: os._exit(1)
    return pid

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    "A whole shard: its folder, and all it says"
    folder = tmp_path_factory.mktemp('good'); write(folder/'v.zip', native=True)
    store = FaceStore(folder)
    return SimpleNamespace(folder=folder, data=(folder/'v.zip').read_bytes(), clips={t.key:store.read(t.key, 0, t.frames, native=True) for t in store.tracks})

def same(a, b): return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ('frames','native','native_offset','sound')+ARRAYS)

def test_killed_writers_leave_old_new_or_nothing(tmp_path):
    rng,whole,n = np.random.default_rng(SEED),0,count(5)
    start = time.perf_counter(); write(tmp_path/'try'/'v.zip'); seconds = time.perf_counter()-start
    for i in range(n):
        folder = tmp_path/str(i)
        if i%2: write(folder/'v.zip', seed=1)
        def forever():
            while True: write(folder/'v.zip', seed=2)
        pid = forked(forever)
        time.sleep(rng.uniform(0, 2*seconds)); os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        there = folder.exists() and (folder/'v.zip').exists()
        if there: assert open_shard(folder/'v.zip', sealed=True)['seed'] in ({1,2} if i%2 else {2}); assert FaceStore(folder).verify()==1
        whole += there or not i%2
        strays = [p.name for p in folder.glob('*') if p.name!='v.zip'] if folder.exists() else []
        assert all(s.startswith('.') and s.endswith('.part') for s in strays), strays
    told(whole, n, 'killed writers that left a whole shard or none', SEED)

def outcome(folder, clips):
    "'error', or 'same' if every clip reads back as it was; anything else is silent damage"
    try:
        store = FaceStore(folder)
        return 'same' if all(same(store.read(k, 0, len(c.frames), native=True), c) for k,c in clips.items()) else 'silent'
    except StoreError: return 'error'

def sealed(folder):
    try: return FaceStore(folder).verify()==1
    except StoreError: return False

def test_a_flipped_bit_is_found(good, tmp_path):
    rng,n,found = np.random.default_rng(SEED+1),count(40),0
    for _ in range(n):
        at,bit = int(rng.integers(len(good.data))),1<<int(rng.integers(8))
        (tmp_path/'v.zip').write_bytes(good.data[:at]+bytes([good.data[at]^bit])+good.data[at+1:])
        found += outcome(tmp_path, good.clips)!='silent' and not sealed(tmp_path)
    told(found, n, 'flipped bits found by the seal, none read as something else', SEED)

def test_damage_in_the_directory_is_found(good, tmp_path):
    "The last kilobytes hold names, places and sizes: the flips that confuse a zip reader most"
    rng,n,found = np.random.default_rng(SEED+2),count(40),0
    for _ in range(n):
        at,bit = len(good.data)-1-int(rng.integers(min(9000, len(good.data)))),1<<int(rng.integers(8))
        (tmp_path/'v.zip').write_bytes(good.data[:at]+bytes([good.data[at]^bit])+good.data[at+1:])
        found += outcome(tmp_path, good.clips)!='silent' and not sealed(tmp_path)
    told(found, n, 'flipped bits in the directory found', SEED)

def test_a_truncated_shard_is_found(good, tmp_path):
    rng,n,found = np.random.default_rng(SEED+3),count(20),0
    for i in range(n):
        (tmp_path/'v.zip').write_bytes(good.data[:[0, 1, len(good.data)-1][i] if i<3 else int(rng.integers(len(good.data)))])
        found += not sealed(tmp_path)
    told(found, n, 'truncated shards found', SEED)

def test_the_message_names_shard_track_frame_and_remedy(good, tmp_path):
    import zipfile
    z = zipfile.ZipFile(good.folder/'v.zip').getinfo('1/crop/000007'); at = z.header_offset+30+len(z.filename)+z.file_size//2
    (tmp_path/'v.zip').write_bytes(good.data[:at]+bytes([good.data[at]^1])+good.data[at+1:])
    store = FaceStore(tmp_path)
    with pytest.raises(StoreError) as e: store.read('d/real/as_is/v#1', 0, 16)
    for part in ('v.zip', 'd/real/as_is/v#1', 'frame 7', 'Remedy: delete this file and prepare again'): assert part in str(e.value)
    assert (e.value.track, e.value.frame)==('d/real/as_is/v#1', 7)
    assert np.array_equal(store.read('d/real/as_is/v#1', 8, 16).frames, good.clips['d/real/as_is/v#1'].frames[8:24])

def test_many_forks_share_one_store(good):
    "Children that inherit an open store read right, all at once"
    store = FaceStore(good.folder); key,clip = next(iter(good.clips.items())); store.read(key, 0, 1)
    def child():
        ok = all(np.array_equal(store.read(key, s, 8).frames, clip.frames[s:s+8]) for s in list(range(16))*3)
        os._exit(0 if ok else 3)
    n = count(4); pids = [forked(child) for _ in range(min(n, 8))]
    codes = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]
    assert codes==[0]*len(pids)

def test_handles_are_bounded_and_not_pickled(tmp_path):
    import pickle
    for i in range(6):
        with ShardWriter(tmp_path/f'{i}.zip') as out: out.add(synthetic(T=8, seed=i), f'd/real/as_is/v{i}', 'anna')
    store = FaceStore(tmp_path, max_open=2)
    for t in store.tracks*2: store.read(t.key, 0, 8); assert len(store._open)<=2
    copy = pickle.loads(pickle.dumps(store))
    assert copy._open=={} and np.array_equal(copy.read(store.tracks[0].key, 0, 8).frames, store.read(store.tracks[0].key, 0, 8).frames)

PAIRS = """
import json,sys,hashlib,torch
from deepfake_nb.clips import FaceStore
from deepfake_nb.batches import PairDataset,pair_loader
def main():
    ds = PairDataset(FaceStore(sys.argv[1]), ['man'], 8, seed=3)
    print(json.dumps([[hashlib.sha256(b.frames.numpy().tobytes()).hexdigest() for b in pair_loader(ds, 2, 6, epoch=1, workers=n)] for n in (0, 1, 2)]))
if __name__=='__main__': main()
"""

def test_pairs_are_the_same_with_workers_of_their_own(tmp_path):
    "The default way workers are born (forkserver), which a notebook cannot show: its classes live in no module"
    from deepfake_nb.stores import build_store
    from deepfake_nb.manifest import pack_manifest
    report = build_store(pack_manifest(['man']), tmp_path/'store', size=96)
    (tmp_path/'pairs.py').write_text(PAIRS)
    r = subprocess.run([sys.executable, tmp_path/'pairs.py', report.folder], capture_output=True, text=True, timeout=300, env=ENV)
    assert r.returncode==0, r.stderr[-2000:]
    none,one,two = json.loads(r.stdout.splitlines()[-1])
    assert len(none)==3 and none==one==two

def test_a_store_built_by_two_processes_is_the_same(tmp_path):
    from deepfake_nb.stores import build_store
    from deepfake_nb.manifest import folder_manifest,pack_manifest
    (tmp_path/'v').mkdir(); (tmp_path/'v'/'letter.mp4').write_text('no film')
    videos = list(pack_manifest(['man','carphone']))+folder_manifest(tmp_path/'v')
    one,two = build_store(videos, tmp_path/'one', size=96),build_store(videos, tmp_path/'two', size=96, workers=2)
    assert one.rows==two.rows and [bool(r.error) for r in two.rows]==[False,False,True]
    for s in one.shards: assert (tmp_path/'one'/s).read_bytes()==(tmp_path/'two'/s).read_bytes()

BUILD = """
import sys,time
from pathlib import Path
from deepfake_nb.stores import build_store
from deepfake_nb.manifest import pack_manifest
def first_then_hang(row, done, total): Path(sys.argv[2]).touch(); time.sleep(60)
if __name__=='__main__': build_store(pack_manifest(['man','carphone']), sys.argv[1], size=96, progress=first_then_hang)
"""

def test_building_is_killed_and_goes_on(tmp_path):
    "kill -9 in the middle of `build_store`: the second run uses what is whole and ends with the same store"
    from deepfake_nb.stores import build_store
    from deepfake_nb.manifest import pack_manifest
    videos,mark = pack_manifest(['man','carphone']),tmp_path/'first is done'
    whole = build_store(videos, tmp_path/'whole', size=96)
    (tmp_path/'build.py').write_text(BUILD)
    p = subprocess.Popen([sys.executable, tmp_path/'build.py', tmp_path/'torn', mark], env=ENV)
    while not mark.exists() and p.poll() is None: time.sleep(.05)
    p.kill(); p.wait()
    again = build_store(videos, tmp_path/'torn', size=96)
    assert [r.reused for r in again.rows]==[True,False]
    for s in whole.shards: assert (tmp_path/'torn'/s).read_bytes()==(tmp_path/'whole'/s).read_bytes()
