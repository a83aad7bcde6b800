"Videos damaged anywhere: what is kept is in order and whole, what is lost is counted, and nothing but a `VideoError` comes out. SOAK=N repeats it N times and prints 'N of N'."
import io,os
import numpy as np,pytest
from deepfake_nb.pack import sample
from deepfake_nb.video import VideoError,VideoFile,read_sound,write_video

SEED,SUFFIXES = 20261,('.mp4','.mkv','.ts','.avi','.mov')

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "The same 90 frames with sound in five containers"
    room = tmp_path_factory.mktemp('videos'); frames,_ = VideoFile(sample('carphone')).read(0, 90)
    tone = (.3*np.sin(np.arange(48000)*.1)).astype(np.float32)
    return [write_video(room/f'a{s}', frames, rate=30, sound=tone, qp=30).read_bytes() for s in SUFFIXES]

def damaged(data, rng):
    "Cut off somewhere, or some bytes replaced"
    b,at = bytearray(data),int(rng.integers(len(data)))
    if rng.random()<.3: return bytes(b[:at])
    n = min(int(rng.choice([1,30,1000,10000])), len(b)-at)
    b[at:at+n] = rng.integers(0, 256, n, dtype=np.uint8).tobytes()
    return bytes(b)

def look(data):
    "Kept and lost frames, or None for a `VideoError`"
    try:
        v = VideoFile(io.BytesIO(data), 'damaged'); index = [f.index for f in v]
        assert index==sorted(set(index)) and sum(v.reasons.values())==v.lost
        return len(index),v.lost
    except VideoError as e: assert 'damaged' in str(e)

def listen(data):
    try: s = read_sound(io.BytesIO(data), name='damaged'); assert s.dtype==np.float32 and np.isfinite(s).all() and np.abs(s).max(initial=0)<=1
    except VideoError as e: assert 'damaged' in str(e)

def test_whole_files_lose_nothing(files):
    for data in files: assert look(data)==(90,0)

def test_damage_is_counted_or_refused(files):
    n,rng,refused = int(os.environ.get('SOAK') or 25),np.random.default_rng(SEED),0
    for i in range(n):
        data = damaged(files[i%5], rng); listen(data)
        if (got := look(data)) is None: refused += 1
        else: assert got[0]<=90 and sum(got)<=96, (SUFFIXES[i%5], got)
    print(f'damaged videos read in order or refused by name: {n} of {n} (seed {SEED}), {refused} refused')
    assert refused<n
