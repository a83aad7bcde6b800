"The leakage audit against a brute-force union, its command line, every kind of link planted alone, and what without_leaks leaves. SOAK=N repeats the counts N times."
import os,random,subprocess,sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
import numpy as np,pytest
from deepfake_nb.leakage import KINDS,LeakError,audit,between,near,same_pictures,without_leaks
from deepfake_nb.manifest import DatasetError,Manifest,Video

SOAK = max(1, int(os.environ.get('SOAK', 0)))
ENV = os.environ|dict(PYTHONPATH=str(Path(__file__).parents[1]), OMP_NUM_THREADS='1')

def row(name, split='', **kw): return Video(**dict(dataset='toy', method='real', compression='as_is', name=str(name), path=Path(str(name)), group='', label=0, split=split)|kw)

def draw(rng, n, words, splits=('','train','val','test')):
    "Random rows, sums and hashes; the fewer words, the more is connected"
    one = lambda p, w: w if rng.random()<p else ''
    rows = [row(i, rng.choice(splits), actor=one(.3, f'toy:{rng.randrange(words)}'), target=one(.2, f'toy:{rng.randrange(words)}'), source=one(.2, f'toy:{rng.randrange(words)}'), recording=one(.2, f'youtube:{rng.randrange(words)}'),
        group=one(.3, f'g{rng.randrange(words)}'), original=one(.2, f'toy/real/as_is/{rng.randrange(n)}')) for i in range(n)]
    sums = {v.key:f'{rng.randrange(words):064x}' for v in rows if rng.random()<.2}
    base = np.random.default_rng(rng.randrange(1<<30)).integers(0, 256, (words,32), np.uint8)
    faces = {v.key:base[[rng.randrange(words)]] for v in rows if rng.random()<.2}
    return rows,sums,faces

def oracle(rows, sums, faces, allow=()):
    "Rows that can be walked to from each row, by looking at all pairs: a colour each. Groups count where nothing else of the rows joins them"
    def colour(linked):
        seen = {}
        for i in range(len(rows)):
            todo = [i] if i not in seen else []
            while todo:
                j = todo.pop()
                if j not in seen: seen[j] = i; todo += [k for k in linked[j] if k not in seen]
        return [seen[i] for i in range(len(rows))]
    def pairs(kinds):
        at = {}
        for i,v in enumerate(rows):
            words = [('person',p) for p in (v.actor, v.target, v.source)]+[('recording',v.recording), ('original',v.original or v.key), ('group',v.group), ('file',sums.get(v.key)), ('pictures',v.key in faces and faces[v.key].tobytes())]
            for w in words:
                if w[1] and w[0] in kinds: at.setdefault(w, set()).add(i)
        return at
    def joined(words):
        linked = [set() for _ in rows]
        for ids in words:
            for i in ids: linked[i] |= ids
        return colour(linked)
    said = joined(pairs(('person','recording','original')).values())
    words = [ids for (k,_),ids in pairs(set(KINDS)-set(allow)).items() if k!='group' or len({said[i] for i in ids})>1]
    return joined(words)

def leaking(rows, colour):
    "Colours with more than one split"
    return {c for c in set(colour) if len({v.split for v,d in zip(rows, colour) if d==c}-{''})>1}

def report(rows, sums, faces, **kw):
    try: return audit(rows, sums, faces, **kw)
    except LeakError as e: return e.leaks

def same_partition(a, b): return len(set(a))==len(set(b))==len(set(zip(a, b)))

def check_chains(rows, leaks, allow=()):
    "Every chain is made of ties that really hold, and ends on two sides"
    for c in leaks.crossing:
        assert len(c.videos)==len(c.ties)+1 and not {t.kind for t in c.ties}&set(allow)
        assert {rows[c.videos[0]].split, rows[c.videos[-1]].split}<={'train','val','test'} and rows[c.videos[0]].split!=rows[c.videos[-1]].split
        for a,b,t in zip(c.videos, c.videos[1:], c.ties): assert a!=b and {a,b}<=set(t.videos)

def test_five_thousand_rows_against_brute_force():
    rows,sums,faces = draw(random.Random(1), 5000, 4000)
    leaks,colour = report(rows, sums, faces),oracle(rows, sums, faces); bad = leaking(rows, colour)
    assert same_partition(leaks.part, colour) and 100<leaks.components<4900
    assert {leaks.part[c.videos[0]] for c in leaks.crossing}=={leaks.part[i] for i,c in enumerate(colour) if c in bad}
    check_chains(rows, leaks)
    assert len({(leaks.part[c.videos[0]], frozenset(rows[c.videos[i]].split for i in (0,-1))) for c in leaks.crossing})==len(leaks.crossing)

def test_chains_are_shortest():
    nx = pytest.importorskip('networkx')
    for seed in range(20*SOAK):
        rows,sums,faces = draw(random.Random(seed), 60, 40); leaks = report(rows, sums, faces); g = nx.Graph()
        for n,t in enumerate(leaks.ties): g.add_edges_from((i, f't{n}') for i in t.videos)
        for c in leaks.crossing:
            x,y = rows[c.videos[0]].split,rows[c.videos[-1]].split; far = nx.multi_source_dijkstra_path_length(g, {i for i in range(60) if rows[i].split==x and i in g and leaks.part[i]==leaks.part[c.videos[0]]})
            assert 2*len(c.ties)==min(d for i,d in far.items() if isinstance(i, int) and rows[i].split==y)

def test_without_leaks_always_passes_and_drops_nothing_in_vain():
    dropped,clean = 0,0
    for seed in range(200*SOAK):
        rng = random.Random(seed); n = rng.randrange(1, 40); rows,sums,faces = draw(rng, n, rng.choice([4, 20, 200]), rng.choice([('train','test'), ('','train','val','test'), ('test',)]))
        allow,keep = rng.choice([(), (), ('person',), ('group','recording')]),rng.choice(['test','test','val','train'])
        if not sums or not faces or seed%4: faces = None
        if seed%4==3: sums = None
        m = Manifest(rows, [('x','before')], ['said before']); before = list(m); left = without_leaks(m, keep, sums, faces, allow)
        assert list(m)==before and left.warnings==['said before'] and left.skipped[0]==('x','before')
        kw = dict(sums={v.key:(sums or {}).get(v.key, '') for v in left}, faces={v.key:faces[v.key] for v in left if v.key in faces} if faces else None)
        assert audit(left, allow=allow, **kw).crossing==[]
        gone = [s.name for s in left.skipped[1:]]
        assert sorted(gone+[v.key for v in left])==sorted(v.key for v in rows) and [v for v in rows if v in left]==list(left)
        assert not [v for v in rows if v.split in ('',keep) and v.key in gone]
        leaks = bool(report(rows, sums, faces, allow=allow).crossing); assert leaks==bool(gone)==bool(leaking(rows, oracle(rows, sums or {}, faces or {}, allow)))
        assert all(f'it leaks into the ' in s.reason and s.name in s.reason for s in left.skipped[1:])
        dropped += len(gone); clean += not gone
    assert dropped>200 and clean>20

A,B,C = row('a', 'train'),row('b', 'test'),row('c', 'val')
PLANT = dict(person=(replace(A, actor='toy:p'), replace(B, target='toy:q', source='toy:p', label=1), {}, 'share the person toy:p'),
    original=(A, replace(B, original=A.key, label=1), {}, f'come from the same original {A.key}'), recording=(replace(A, recording='youtube:x'), replace(B, recording='youtube:x'), {}, 'are cut from the same recording youtube:x'),
    group=(replace(A, group='g'), replace(B, group='g'), {}, 'are both in the group g'), file=(A, B, dict(sums={A.key:'c0ffee'*8, B.key:'c0ffee'*8, C.key:'0'*48}), 'are the same file (sha256 c0ffeec0ffee...)'),
    pictures=(A, B, dict(faces={A.key:np.zeros((3,32), np.uint8), B.key:np.array([[255]*32, [7]*8+[0]*24], np.uint8), C.key:np.full((3,32), 15, np.uint8)}), 'show the same pictures (1 of 2 hashes within 24 bits)'))

@pytest.mark.parametrize('kind', PLANT)
def test_each_kind_is_found_named_allowed_and_dropped(kind):
    a,b,kw,words = PLANT[kind]; far = row('z', 'test', group='other', actor='toy:z', recording='youtube:z')
    with pytest.raises(LeakError) as e: audit([a, C, far, b], **kw)
    assert words in str(e.value) and f'{a.key} (train)' in str(e.value) and f'{b.key} (test)' in str(e.value) and kind in str(e.value) and words in repr(e.value.leaks)
    assert e.value.leaks.links=={kind:1} and e.value.leaks.components==3
    ok = audit([a, C, far, b], allow=(kind,), **kw); assert [t.kind for t in ok.allowed]==[kind] and ok.components==4 and kind in repr(ok).split('accepted')[1]
    assert [v.name for v in without_leaks(Manifest([a, C, far, b]), **kw)]==['c','z','b']
    for other in set(KINDS)-{kind}:
        with pytest.raises(LeakError): audit([a, C, far, b], allow=(other,), **kw)
    assert not audit([a, replace(b, split='train')], **kw).crossing and not audit([a, replace(b, split='')], **kw).crossing
    with pytest.raises(LeakError, match=kind): between([replace(a, split='')], [replace(b, split='')], **kw)
    assert between([a, C], [far], **({k:v for k,v in kw.items()})).crossing==[]

def test_all_that_is_allowed_is_named():
    for seed in range(30*SOAK):
        rows,sums,faces = draw(random.Random(seed), 30, 20, ('train','test')); allow = ('person','group','recording','original','file','pictures'); ok = audit(rows, sums, faces, allow)
        split = lambda t: {rows[i].split for i in t.videos}
        assert [t for t in ok.ties if len(split(t))>1]==[t for t in ok.ties if t in ok.allowed and len(split(t))>1] and bool(ok.allowed)==bool(report(rows, sums, faces).crossing)
        some = report(rows, sums, faces, allow=('person',)); assert {t.kind for t in some.allowed}<={'person'} and [t for t in some.ties if t.kind=='person' and len(split(t))>1]==[t for t in some.allowed if len(split(t))>1]

def test_keys_and_odd_input():
    with pytest.raises(LeakError, match='a \\(train,test\\)'): audit([A, replace(A, split='test')])
    with pytest.raises(LeakError, match='more than once'): audit([A, A])
    with pytest.raises(LeakError, match='are the same video'): between([A], [replace(A, split='test')])
    with pytest.raises(DatasetError, match='Test'): audit([replace(A, split='Test')])
    with pytest.raises(DatasetError, match='no kind'): audit([A], allow=('face',))

def test_near_is_exact_on_clustered_hashes():
    for seed in range(3*SOAK):
        rng = np.random.default_rng(seed); base = rng.integers(0, 2, (60,256), np.uint8)
        h = np.packbits(base[rng.integers(60, size=900)]^(rng.random((900,256))<rng.random((900,1))*.12), axis=1); owner = rng.integers(0, 60, 900); bits = int(rng.integers(0, 60))
        d = np.bitwise_count(h[:,None]^h[None]).sum(-1, dtype=int); i,j = np.nonzero((d<=bits)&(owner[:,None]!=owner[None])); want = np.stack([i,j], 1)[i<j]
        assert len(want)>0 and np.array_equal(near(h, owner, bits), want)
        faces = {str(k):h[owner==k] for k in range(60)}; got = {(p.a,p.b):p for p in same_pictures(faces, bits)}
        assert set(got)=={(str(min(p)),str(max(p))) for p in {(owner[x],owner[y]) for x,y in want}}
        for p in list(got.values())[:50]:
            x,y = sorted((faces[p.a], faces[p.b]), key=len)
            if len(x)<len(y): assert (p.k, p.n)==(int((np.bitwise_count(x[:,None]^y[None]).sum(-1, dtype=int)<=bits).any(1).sum()), len(x))

def cli(*args): r = subprocess.run([sys.executable, '-m', 'deepfake_nb.leakage', *map(str, args)], env=ENV, capture_output=True, text=True, timeout=60); return r.returncode,r.stdout,r.stderr

def test_command_line(tmp_path):
    for n,b in (('a',b'1'), ('b',b'1'), ('c',b'3')): (tmp_path/n).write_bytes(b)
    a,b,c,inside = [replace(v, path=tmp_path/v.name) for v in (A, B, C)]+[row('m', 'test', member='x/m.mp4')]
    one = Manifest([a, b, c, replace(inside, path=tmp_path/'c')]).save(tmp_path/'one.jsonl'); people = Manifest([replace(a, name='p', actor='toy:p'), replace(b, name='q', actor='toy:p')]).save(tmp_path/'people.jsonl')
    assert cli(one)[0]==0
    code,out,_ = cli(one, '--sums'); assert code==1 and 'are the same file' in out and f'{a.key} (train)' in out and f'{b.key} (test)' in out and '3 files hashed, 1 not (1 not hashed: in an archive)' in out
    code,out,err = cli(people, '--allow', 'person'); assert code==0 and 'person toy:p: 1 train, 1 test' in out and not err
    code,out,_ = cli(one, people); assert code==1 and 'share the person toy:p' in out and out.count('nothing is on both sides')==2
    (tmp_path/'b').unlink(); code,out,err = cli(one, '--sums'); assert code==2 and 'b: not there (1 of 3 files)' in err and 'Traceback' not in err
    people.write_text(people.read_text()[:-20]); code,out,err = cli(one, people); assert code==2 and 'people.jsonl' in err and 'Traceback' not in err
    assert cli(tmp_path/'none.jsonl')[0]==2 and cli(one, '--allow', 'persons')[0]==2
