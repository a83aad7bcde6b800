"Balanced sampling: 300 random sets of tracks keep what chapter 7c promises; batches are the same for any number of workers, and go on where they stopped"
import json,os,pickle,subprocess,sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
import numpy as np,pytest
from deepfake_nb.balance import BalancedSampler,Position,seen_so_far
from deepfake_nb.clips import ShardWriter,StoreError,TrackInfo

SEED = 20261
ENV = os.environ|dict(PYTHONPATH=str(Path(__file__).parents[1]))

def random_set(rng):
    "Tracks of up to 30 reals and four methods, some too short, some videos with several tracks, some groups without reals or fakes; and who was made from whom"
    groups = [f'g{i}' for i in range(rng.integers(1, 9))]
    def video(method, i, group, label):
        v = f'd/{method}/c23/{i}'
        return [TrackInfo(f'{v}#{n}', v, str(group), label, int(rng.integers(5, 40)), 25., 0, 64, 's.zip', n, 1.5) for n in range(rng.choice([1,1,1,2,3]))]
    reals = [video('real', i, rng.choice(groups), 0) for i in range(rng.integers(1, 31))]
    sizes = [rng.integers(1, [3,10,40][rng.integers(3)]) for _ in range(rng.integers(1, 5))]
    fakes = [video(f'm{m}', i, rng.choice([*groups, 'nobody']), 1) for m,n in enumerate(sizes) for i in range(n)]
    of = {g:[r[0].video for r in reals if r[0].group==g] for g in groups}
    known = {f[0].video:str(rng.choice(of[f[0].group])) for f in fakes if of.get(f[0].group) and rng.random()<.5}
    tracks = [t for v in reals+fakes for t in v]
    rng.shuffle(tracks)
    return tracks,known if rng.random()<.5 else None

def sets(n, length=10):
    "`n` random sets that can be sampled, and their samplers; and how many could not"
    rng,good,refused = np.random.default_rng(SEED),[],0
    while len(good)<n:
        tracks,known = random_set(rng)
        usable = {t.label for t in tracks if t.frames>=length}
        try: s = BalancedSampler(tracks, length, seed=len(good), originals=known)
        except StoreError:
            assert usable!={0,1}; refused += 1; continue
        assert usable=={0,1}; good.append((tracks, known, s))
    return good,refused

@pytest.fixture(scope='module')
def drawn(): return sets(300)

def test_random_sets_are_refused_where_a_kind_is_missing(drawn):
    good,refused = drawn
    assert len(good)==300 and refused>0

def test_all_is_used_and_what_is_not_is_named(drawn):
    for tracks,_,s in drawn[0]:
        assert s.left_out.keys()=={t.key for t in tracks if t.frames<10}
        assert s.videos==sorted({t.video for t in tracks if t.frames>=10})
        for epoch in range(2):
            o = s.order('p', epoch)
            assert o.shape==(len(s), 2) and set(o.ravel())==set(range(len(s.videos)))
            assert set(o[:,0])==set(s.reals) and not set(o[:,1])&set(s.reals)

def test_methods_take_turns_in_every_prefix(drawn):
    for _,_,s in drawn[0]:
        o = np.concatenate([s.order('p', 0)]*2) # past the end it begins anew
        method = np.array([v.split('/')[1] for v in s.videos])[o[:,1]]
        ahead = np.stack([np.cumsum(method==m) for m in s.fakes])
        assert np.ptp(ahead, axis=0).max()<=1
        count = np.bincount(o[:len(s),1], minlength=len(s.videos))
        for fs in s.fakes.values(): assert np.ptp(count[fs])<=1

def test_couples_are_of_one_group_wherever_possible(drawn):
    "A fake whose group has a real meets it, unless a real would otherwise not be shown"
    some = 0
    for _,known,s in drawn[0]:
        o = s.order('p', 1); real,fake = s.group[o[:,0]],s.group[o[:,1]]
        have,apart = set(s.group[s.reals]),real!=fake
        assert s.strangers('p', 1)==apart.sum()
        homeless = np.array([g not in have for g in fake])
        assert (apart|~homeless).all()
        turns = Counter(o[:,0].tolist())
        for r in o[apart&~homeless,0].tolist(): assert turns[r]==1
        assert not set(real[apart&~homeless])&set(fake[apart&~homeless]) # two that should have met
        if len(s)==s.first*len(s.fakes): assert not (apart&~homeless).any()
        if known and s.rounds==s.first:
            for r,f in o:
                if (v := known.get(s.videos[f])) in s.videos: assert s.videos[r]==v
        some += apart.any()
    assert 50<some<300

def test_order_is_pure(drawn):
    differ = Counter()
    for i,(tracks,known,s) in enumerate(drawn[0]):
        o = s.order('p', 0).copy()
        assert np.array_equal(BalancedSampler(tracks[::-1], 10, seed=i, originals=known).order('p', 0), o)
        other = dict(seed=BalancedSampler(tracks, 10, seed=i+1000, originals=known).order('p', 0), chunk=s.order('q', 0), epoch=s.order('p', 1))
        for k,p in other.items(): assert p.shape==o.shape; differ[k] += not np.array_equal(p, o)
        assert np.array_equal(s.order('p', 0), o)
    assert all(n>280 for n in differ.values()), differ # a set of one real and one fake has one order only

def test_order_is_the_same_in_another_process(drawn):
    "Python's `hash` of a string is not"
    tracks,known,s = drawn[0][0]
    code = "import sys,pickle; s = pickle.load(sys.stdin.buffer); s._last = None,None; print(s.order('name of a part', 3).tolist(), s.item('name of a part', 3, 1))"
    outs = [subprocess.run([sys.executable, '-c', code], input=pickle.dumps(s), capture_output=True, env=ENV|dict(PYTHONHASHSEED=h)).stdout.decode() for h in '12']
    assert outs[0]==outs[1]==f"{s.order('name of a part', 3).tolist()} {s.item('name of a part', 3, 1)}\n"

def test_seen_is_what_is_counted_one_by_one(drawn):
    rng = np.random.default_rng(SEED+1)
    for _,_,s in drawn[0]:
        frames,n = {t.key:t.frames for ts in s.tracks.values() for t in ts},int(rng.integers(len(s)+5))
        items = [s.item('p', 2, i) for i in range(n)]
        assert s.seen('p', 2, n)==Counter(k.split('#')[0] for c in items for k,_ in c)
        assert all(0<=start<=frames[k]-10 for c in items for k,start in c)
        both = seen_so_far({'p':s, 'q':s}, [('p', 2, n), ('q', 0)], Position('q', 1, 3))
        assert both.total()==2*(n+len(s)+3) and min(both[v] for v in s.videos)>=1

def test_every_track_of_a_video_can_be_drawn():
    one = lambda v,n,label,frames: TrackInfo(f'{v}#{n}', v, 'g', label, frames, 25., 0, 64, 's.zip', n, 1.5)
    s = BalancedSampler([one('d/real/c/a', 0, 0, 12), one('d/real/c/a', 1, 0, 9), one('d/real/c/a', 2, 0, 10), one('d/m/c/b', 0, 1, 11)], 10)
    clips = [s.item(0, 0, i) for i in range(200)]
    assert {c[0] for c in clips}=={('d/real/c/a#0', 0), ('d/real/c/a#0', 1), ('d/real/c/a#0', 2), ('d/real/c/a#2', 0)}
    assert {c[1] for c in clips}=={('d/m/c/b#0', 0), ('d/m/c/b#0', 1)}
    assert len(set(clips))==8

def synthetic(seed, T=16, size=32):
    rng = np.random.default_rng(seed)
    return SimpleNamespace(crops=rng.integers(0, 256, (T,size,size,3), np.uint8), landmarks=rng.random((T,468,2), np.float32), boxes=rng.random((T,4), np.float32),
        transforms=rng.random((T,2,3), np.float32), times=np.arange(T)/25, presence=np.ones(T, np.float32), start=0, source='synthetic', margin=1.5, native=None, native_offset=None)

LOADER = """
import hashlib,json,multiprocessing,sys
from deepfake_nb.balance import BalancedSampler
from deepfake_nb.clips import FaceStore
from deepfake_nb.batches import labelled_loader
def told(b):
    h = hashlib.sha256(b''.join(getattr(b, k).numpy().tobytes() for k in ('frames','landmarks','times','label','pair')))
    h.update(json.dumps([b.key, b.group, b.start, b.cursor]).encode())
    assert b.label.tolist()==[0,0,0,1,1,1] and b.cursor[:2]==("part_7", 1)
    return h.hexdigest()
def run(workers, at=('part_7', 1, 0), stop=None):
    out = []
    for b in labelled_loader(store, sampler, 3, *at, workers=workers):
        out.append(told(b)); at = b.cursor
        if len(out)==stop: break
    return out,at
if __name__=='__main__':
    multiprocessing.set_forkserver_preload(['deepfake_nb.batches'])
    store = FaceStore(sys.argv[1]); sampler = BalancedSampler(store.tracks, 8, seed=5)
    whole = {n:run(n)[0] for n in (0, 1, 2, 4)}
    resumed = {}
    for k,a,b in json.loads(sys.argv[2]):
        head,at = run(a, stop=k)
        resumed[f'{k} {a} {b}'] = head+run(b, json.loads(json.dumps(at)))[0]
    print(json.dumps(dict(whole=whole, resumed=resumed, couples=len(sampler))))
"""

def test_batches_are_the_same_for_any_number_of_workers_and_after_a_stop(tmp_path):
    "Workers are born by forkserver, as in a training; the position goes through JSON, as in a checkpoint"
    videos = [('real', i, 0) for i in range(4)]+[('swap', i, 1) for i in range(7)]+[('lips', i, 1) for i in range(3)]
    for j,(method,i,label) in enumerate(videos):
        with ShardWriter(tmp_path/'store'/f'{method}{i}.zip') as out:
            for n in range(1+(j%3==0)): out.add(synthetic(10*j+n), f'd/{method}/c23/{i}', f'g{i%5}', label)
    (tmp_path/'loader.py').write_text(LOADER)
    stops = [(1,2,0), (2,0,4), (3,4,1), (4,1,2), (2,2,4), (3,0,0), (5,4,2)]
    r = subprocess.run([sys.executable, tmp_path/'loader.py', tmp_path/'store', json.dumps(stops)], capture_output=True, text=True, timeout=120, env=ENV)
    assert r.returncode==0, r.stderr[-2000:]
    got = json.loads(r.stdout.splitlines()[-1]); whole = got['whole']['0']
    assert len(whole)==len(set(whole))==-(-got['couples']//3)==5 and got['couples']==14
    assert whole==got['whole']['1']==got['whole']['2']==got['whole']['4']
    assert len(got['resumed'])==len(stops)
    for name,batches in got['resumed'].items(): assert batches==whole, name
