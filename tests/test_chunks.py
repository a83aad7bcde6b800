"Chunks under fire: preparations killed at any moment, zips damaged in a hundred ways, servers that break off, parents that die. SOAK=N repeats each count N times and prints 'N of N'."
import io,json,os,re,shutil,signal,struct,subprocess,sys,tarfile,threading,time,zipfile
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler,ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs,unquote,urlsplit
import fsspec,numpy as np,pytest
from deepfake_nb import chunks,sources
from deepfake_nb.chunks import Chunk,ChunkError,ChunkProgress,ChunkQueue,DiskError,fetch_chunk,find_chunks,main,need_bytes,prepare_chunk
from deepfake_nb.clips import FaceStore,StoreError,open_shard
from deepfake_nb.manifest import DatasetError
from deepfake_nb.miniatures import miniature
from deepfake_nb.sources import Limits
from deepfake_nb.stores import Settings

from common import count,told,wait_for

SEED = 20261
ENV = os.environ|dict(PYTHONPATH=os.pathsep.join([str(Path(chunks.__file__).parents[1]), os.environ.get('PYTHONPATH', '')]))
SMALL = dict(size=64)

def command(zips, store, *more): return [sys.executable, '-m', 'deepfake_nb.chunks', 'prepare', *map(str, zips), '--store', str(store), '--size', '64', *more]

def alive(session):
    "Processes of a session that are not dead"
    out = []
    for p in Path('/proc').glob('[0-9]*/stat'):
        try: state,_,_,sid = p.read_text().rpartition(')')[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError): continue
        if int(sid)==session and state not in 'ZX': out.append(int(p.parent.name))
    return out

def seen(folder, skip=('prepare.log','progress.json')): return {p.relative_to(folder).as_posix():p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file() and p.name not in skip}
def shards(folder): return {p.name:p.read_bytes() for p in folder.glob('*.zip')}
def identity(folder): return {p.name:(p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob('*.zip')} if folder.exists() else {}

@pytest.fixture(scope='module')
def mini(tmp_path_factory):
    "Three chunks of seven tiny videos, and what an undisturbed preparation makes of the first"
    root = miniature('dfdc', tmp_path_factory.mktemp('mini'), parts=3)
    store = tmp_path_factory.mktemp('whole')
    report,*_ = [prepare_chunk(c, store, **SMALL) for c in find_chunks(root)]
    with zipfile.ZipFile(root/'00.zip') as z: files = {n:z.read(n) for n in z.namelist()}
    return SimpleNamespace(root=root, zips=[root/f'{i:02d}.zip' for i in range(3)], store=store, home=store/'00', report=report, files=files, whole=seen(store/'00'))

def seed(mini, store, *names):
    "Stores that are prepared already"
    for n in names: shutil.copytree(mini.store/n, store/n)
    return store

# ------------------------------------------------------------------ killed

@pytest.mark.parametrize('workers', [0, 2])
def test_killed_preparations_go_on(mini, tmp_path, workers):
    "kill -9 at any moment: under its final name a shard is whole, what is whole is kept, and the end is the same to the last byte"
    rng,n,good,cut = np.random.default_rng(SEED+workers),count(3-workers//2),0,0
    start = time.perf_counter(); subprocess.run(command(mini.zips[:1], tmp_path/'first', f'--workers={workers}'), env=ENV, check=True, capture_output=True); seconds = time.perf_counter()-start
    assert seen(tmp_path/'first'/'00')==mini.whole
    for i in range(n):
        store = tmp_path/str(i); home = store/'00'
        p = subprocess.Popen(command(mini.zips[:1], store, f'--workers={workers}'), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        if i%2: time.sleep(rng.uniform(.2, 1)*seconds)
        else: wait_for(lambda: list(home.glob('*.zip'))); time.sleep(rng.uniform(0, .3)*seconds)
        os.killpg(p.pid, signal.SIGKILL); p.wait()
        wait_for(lambda: not alive(p.pid), 10)
        for z in home.glob('[!.]*.zip'): open_shard(z, sealed=True)
        before = identity(home); cut += 0<len(before)<7
        if (home/'prepared.json').exists(): assert seen(home)==mini.whole
        prepare_chunk(Chunk('00', mini.zips[0]), store, **SMALL)
        after = identity(home)
        assert {k:after.get(k) for k in before}==before, 'a whole shard was written twice'
        good += seen(home)==mini.whole
        shutil.rmtree(store)
    print(f'{cut} of {n} were killed with some shards written')
    told(good, n, f'killed preparations ({workers} workers) that went on and ended the same', SEED)

def test_nothing_half_written_is_ever_seen(mini, tmp_path):
    "A reader that looks while a chunk is prepared finds whole shards, and `prepared.json` only when all is there"
    p = subprocess.Popen(command(mini.zips[:1], tmp_path), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    looks = 0
    while p.poll() is None:
        done = (tmp_path/'00'/'prepared.json').exists(); got = list((tmp_path/'00').glob('[!.]*.zip'))
        for z in got: open_shard(z, sealed=True)
        assert not done or (len(got)==7 and seen(tmp_path/'00')==mini.whole)
        if (pr := ChunkProgress.read(tmp_path/'00')): assert pr.total==7 and 0<=pr.done<=7
        looks += 0<len(got)<7
    assert p.returncode==0 and looks and seen(tmp_path/'00')==mini.whole

# ------------------------------------------------------------------ once

def test_prepared_once(mini, tmp_path):
    c = Chunk('00', tmp_path/'00.zip'); shutil.copy2(mini.zips[0], c.path)
    (tmp_path/'s'/'00').mkdir(parents=True); (tmp_path/'s'/'00'/'.x.zip.0123.part').write_bytes(b'of a writer that was killed')
    first = prepare_chunk(c, tmp_path/'s', **SMALL); before = identity(first.folder)
    again = prepare_chunk(c, tmp_path/'s', **SMALL)
    assert not list(first.folder.glob('.*.part')) and (first.fresh, again.fresh)==(True, False) and (again.videos, again.quarantine)==(first.videos, first.quarantine) and len(again.store().tracks)==7
    other = prepare_chunk(c, tmp_path/'s', size=96)
    assert other.fresh and {t.size for t in other.store().tracks}=={96} and not before.keys()&identity(other.folder).keys()
    os.utime(c.path); assert prepare_chunk(c, tmp_path/'s', size=96).fresh
    next(other.folder.glob('*.zip')).unlink(); fixed = prepare_chunk(c, tmp_path/'s', size=96)
    assert fixed.fresh and len(fixed.store().tracks)==7
    c.path.unlink(); assert not prepare_chunk(c, tmp_path/'s', size=96).fresh
    with pytest.raises(ChunkError, match='is not there or out of reach'): prepare_chunk(c, tmp_path/'s', size=80)

def test_only_one_prepares(mini, tmp_path):
    "A second preparer says who is at it, or waits and finds it done"
    held = subprocess.Popen([sys.executable, '-c', 'import sys,time; from pathlib import Path; from deepfake_nb.chunks import _locked\nwith _locked(Path(sys.argv[1]), "x"): print("held", flush=True); time.sleep(60)', str(tmp_path/'.00.lock')], env=ENV, stdout=subprocess.PIPE, text=True)
    assert held.stdout.readline()=='held\n'
    with pytest.raises(ChunkError, match=f'is being prepared by process {held.pid}'): prepare_chunk(Chunk('00', mini.zips[0]), tmp_path, **SMALL)
    assert not list(tmp_path.rglob('*.zip'))
    held.kill(); held.wait()
    ps = [subprocess.Popen(command(mini.zips[:1], tmp_path, '--wait=60'), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=120) for p in ps]
    assert [p.returncode for p in ps]==[0, 0], said
    assert sum('7/7' in err for _,err in said)==1 and seen(tmp_path/'00')==mini.whole

# ------------------------------------------------------------------ damaged

def names_of(mini): return {n.split('/')[-1]:b for n,b in mini.files.items() if n.endswith('.mp4')}

def pack(files, meta=None, how=zipfile.ZIP_DEFLATED, extra=()):
    "A zip of name -> bytes; `meta` is metadata.json, as bytes or as what it says; `extra` are (name, bytes) that may repeat"
    out = io.BytesIO(); import warnings
    with zipfile.ZipFile(out, 'w', how) as z, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for n,b in [*files.items(), *extra]: z.writestr(zipfile.ZipInfo(n), b, how)
        if meta is not None: z.writestr(zipfile.ZipInfo('p/metadata.json'), meta if isinstance(meta, bytes) else json.dumps(meta), how)
    return out.getvalue()

def patched(data, name, offset, value, fmt='<I', last=False):
    "The zip with one field of the central entry of `name` changed"
    at = (data.rindex if last else data.index)(b'PK\x01\x02', 0)
    while data[at+46:at+46+struct.unpack_from('<H', data, at+28)[0]]!=name.encode(): at = data.index(b'PK\x01\x02', at+4)
    b = bytearray(data); struct.pack_into(fmt, b, at+offset, value); return bytes(b)

def damaged(mini, rng, kind, place):
    "A damaged zip, and names that must be found in its report (films it may have harmed at all are found by their bytes)"
    films,meta = names_of(mini),json.loads(mini.files['dfdc_train_part_0/metadata.json'])
    one,two = map(str, rng.choice(sorted(films), 2, replace=False)); files = {f'p/{n}':b for n,b in films.items()}
    reals = [n for n in films if meta[n]['label']=='REAL']; how = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED][int(rng.integers(2))]
    whole = pack(files, meta, how)
    def flip(lo, hi, k=1):
        b = bytearray(whole)
        for _ in range(k): b[int(rng.integers(lo, hi))] ^= 1<<int(rng.integers(8))
        return bytes(b)
    directory = whole.index(b'PK\x01\x02'); fake = dict(label='FAKE', split='train', original=reals[0])
    if kind=='truncated': return whole[:int(rng.integers(len(whole)))],[]
    if kind=='one flip': return flip(0, len(whole)),[]
    if kind=='many flips': return flip(0, len(whole), int(rng.integers(2, 60))),[]
    if kind=='directory': return flip(directory, len(whole), int(rng.integers(1, 4))),[]
    if kind=='zeros': at = int(rng.integers(len(whole))); return whole[:at]+bytes(min(5000, len(whole)-at))+whole[at+5000:],[]
    if kind=='bomb': return pack(files|{'p/bomb.mp4':bytes(4<<20)}, meta|{'bomb.mp4':fake}),['bomb.mp4']
    if kind=='lying small': return patched(whole, f'p/{one}', 24, int(rng.integers(1, 500))),[one]
    if kind=='lying large': return patched(whole, f'p/{one}', 24, int(rng.integers(len(films[one])+1, 1<<31))),[one]
    if kind=='lying bomb': return patched(pack(files|{'p/bomb.mp4':bytes(4<<20)}, meta|{'bomb.mp4':fake}), 'p/bomb.mp4', 24, 900_000),['bomb.mp4']
    if kind=='unsafe name':
        name = [f'../{one[:3]}evil.mp4', f'p/../../{one[:3]}evil.mp4', f'{place}/evil.mp4', 'C:\\evil.mp4', '\\\\host\\evil.mp4', 'p/..\\evil.mp4'][int(rng.integers(6))]
        return pack(files, meta|{'evil.mp4':fake, f'{one[:3]}evil.mp4':fake}, how, [(name, films[two])]),['evil.mp4']
    if kind=='bad JSON':
        text = json.dumps(meta).encode()
        return pack(files, [text[:int(rng.integers(len(text)-1))], b'', b'[]', b'null', b'{"a": ', b'['*100_000, bytes(rng.integers(0, 256, 300, np.uint8)), b'{}'][int(rng.integers(8))], how),[]
    if kind=='wrong label': return pack(files, meta|{one:[dict(label='MAYBE'), dict(label=7), dict(label=None), ['FAKE'], None, 'FAKE', dict(label=['FAKE']), dict(label='FAKE', original=5), {}][int(rng.integers(9))]}, how),[one]
    if kind=='no label': return pack(files, {n:d for n,d in meta.items() if n!=one}, how),[one]
    if kind=='listed, not there': return pack({n:b for n,b in files.items() if n!=f'p/{one}'}, meta, how),[one]
    if kind=='zero bytes': return pack(files|{f'p/{one}':b''}, meta, how),[one]
    if kind=='no metadata': return pack(files, None, how),[]
    if kind=='twice': return pack(files, meta, how, [(f'p/{one}', films[two])]),[one]
    if kind=='encrypted': return patched(whole, f'p/{one}', 8, 1, '<H'),[one]
    if kind=='unknown method': return patched(whole, f'p/{one}', 10, int(rng.integers(15, 999)), '<H'),[one]
    if kind=='no film': return pack(files|{f'p/{one}':[b'Dear diary', films[one][:len(films[one])//3], bytes(5000), films[one][:40]+bytes(rng.integers(0, 256, 4000, np.uint8))][int(rng.integers(4))]}, meta, how),[one]
    if kind=='odd names': return pack(files|{'p/\u202egpj.mp4':films[one], 'p/'+'x'*300+'.mp4':films[two], 'p/a\nb\x1b[31m.mp4':films[one]}, meta|{'\ud800.mp4':fake}, how),['x'*300, '\ud800']
    if kind=='a tar':
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode='w') as t:
            for n,b in files.items(): i = tarfile.TarInfo(n); i.size = len(b); t.addfile(i, io.BytesIO(b))
        return out.getvalue(),[]
    if kind=='nothing': return [b'', b'PK', b'PK\x05\x06'+bytes(18), b'<html>404</html>'][int(rng.integers(4))],[]

KINDS = ['truncated','one flip','many flips','directory','zeros','bomb','lying small','lying large','lying bomb','unsafe name','bad JSON','wrong label','no label','listed, not there','zero bytes','no metadata','twice','encrypted','unknown method','no film','odd names','a tar','nothing']
HOPELESS = 'truncated','directory','many flips','one flip','zeros','bad JSON','no metadata','a tar','nothing' # of these a whole chunk may be refused

def test_damaged_chunks(mini, tmp_path):
    "Whatever is in the zip: an error that names it, or every film in the store as it was or in the quarantine with a reason; and no file anywhere else"
    rng,n,good,refused = np.random.default_rng(SEED+7),count(46),0,0
    want = {n:sha256(b).hexdigest() for n,b in names_of(mini).items()}; ready = {p.name:p for p in mini.home.glob('*.zip')}
    for i in range(n):
        kind,place = KINDS[i%len(KINDS)],tmp_path/f'case {i}'; (place/'in').mkdir(parents=True); home = place/'store'/'00'; home.mkdir(parents=True)
        for name,p in ready.items(): os.link(p, home/name)
        data,names = damaged(mini, rng, kind, place); (place/'in'/'00.zip').write_bytes(data)
        try: report = prepare_chunk(Chunk('00', place/'in'/'00.zip'), place/'store', tolerate=1, **SMALL)
        except DatasetError as e:
            assert kind in HOPELESS and '00' in str(e) and len(str(e))<2000, (kind, e); refused += 1
        else:
            listed = json.loads((home/'quarantine.json').read_text()); told_of = '\n'.join(m['name'] for m in listed['members'])
            assert all(m['reason'] for m in listed['members']) and sum(listed['counts'].values())==len(listed['members'])
            assert all(x in told_of for x in names), (kind, names, told_of)
            rows = {r['key'].split('/')[-1]:r for r in json.loads((home/'store.json').read_text())['rows']}
            tracks = FaceStore(home).tracks; FaceStore(home).verify()
            for name,digest in want.items():
                r = rows.get(name); kept = r and not r['error'] and r['sha256']==digest and r['tracks']
                assert kept or name in told_of, (i, kind, name)
                if kind not in HOPELESS and name not in names: assert kept, (i, kind, name, 'a healthy film is missing')
            assert len({t.video for t in tracks})==sum(bool(r['tracks']) for r in rows.values())
        stray = [p for p in place.rglob('*') if p.is_file() and not p.is_relative_to(place/'store') and p!=place/'in'/'00.zip']
        assert not stray and not [p for p in (place/'store').rglob('*') if 'evil' in p.name or p.suffix=='.mp4'], stray
        assert {p.name for p in (place/'store').iterdir()}<={'00','.00.lock'} and all(p.read_bytes()==b for p,b in ((mini.zips[0], mini.zips[0].read_bytes()),))
        good += 1; shutil.rmtree(place)
    assert not [p for p in tmp_path.rglob('*')] and seen(mini.home)==mini.whole
    print(f'{refused} of {n} chunks were refused as a whole')
    told(good, n, 'damaged chunks with every film accounted for', SEED)

def test_too_many_bad_films(mini, tmp_path):
    films,meta = names_of(mini),json.loads(mini.files['dfdc_train_part_0/metadata.json']); bad = sorted(films)[:2]
    (tmp_path/'00.zip').write_bytes(pack({f'p/{n}':b'no film' if n in bad else b for n,b in films.items()}, meta)); c = Chunk('00', tmp_path/'00.zip')
    with pytest.raises(ChunkError, match=r'29 % of its films cannot be used \(20 % are tolerated\), [56] have a face\. Mostly: 2 x') as e: prepare_chunk(c, tmp_path/'s', tolerate=.2, **SMALL)
    assert 'quarantine.json' in str(e.value) and [m['name'] for m in json.loads((tmp_path/'s'/'00'/'quarantine.json').read_text())['members']]==[f'00/{n}' for n in bad] and not (tmp_path/'s'/'00'/'prepared.json').exists()
    r = prepare_chunk(c, tmp_path/'s', tolerate=.3, **SMALL); assert len(r.quarantine)==2 and len(r.store().tracks)==5
    (tmp_path/'00.zip').write_bytes(pack({f'p/{n}':b'no film' for n in films}, meta))
    with pytest.raises(ChunkError, match='100 % of its films'): prepare_chunk(c, tmp_path/'s2', tolerate=1, **SMALL)

def test_narrower_limits(mini, tmp_path):
    sizes = {n:len(b) for n,b in names_of(mini).items()}; most = sorted(sizes.values())[4]
    r = prepare_chunk(Chunk('00', mini.zips[0]), tmp_path, tolerate=1, limits=Limits(bytes=most), **SMALL)
    assert {s.name.split('/')[-1] for s in r.quarantine}=={n for n,k in sizes.items() if k>most} and all(f'the limit is {most}' in s.reason for s in r.quarantine)
    for limits in (Limits(members=3), Limits(total=1000)):
        with pytest.raises(DatasetError, match='more than'): prepare_chunk(Chunk('00', mini.zips[0]), tmp_path/'b', limits=limits, **SMALL)

# ------------------------------------------------------------------ far away

class Server(BaseHTTPRequestHandler):
    "Files with ranges; `server.files` path -> bytes, `server.sent` counts, after `server.left` bytes it hangs up. As s3: /bucket?list-type=2"
    protocol_version = 'HTTP/1.1'
    def log_message(self, *a): pass
    def do_HEAD(self): self.answer(False)
    def do_GET(self): self.answer(True)
    def answer(self, body):
        s,url = self.server,urlsplit(self.path); path,q = unquote(url.path),parse_qs(url.query); s.asked.append((self.command, path))
        if 'list-type' in q: return self.listing(path.strip('/'), q.get('prefix', [''])[0], body)
        data = s.files.get(path)
        if data is None: self.send_response(404); self.send_header('Content-Length', '0'); self.end_headers(); return
        lo,hi,m = 0,len(data)-1,re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '') if s.ranges else None
        if m: lo,hi = int(m[1]),min(int(m[2] or hi), hi)
        if m and lo>=len(data): self.send_response(416); self.send_header('Content-Length', '0'); self.end_headers(); return
        self.send_response(206 if m else 200)
        for k,v in (('Content-Length',hi-lo+1),('ETag',f'"{sha256(data).hexdigest()[:32]}"'),('Last-Modified','Tue, 01 Sep 2026 00:00:00 GMT'),*([('Accept-Ranges','bytes')] if s.ranges else []),*([('Content-Range',f'bytes {lo}-{hi}/{len(data)}')] if m else [])): self.send_header(k, str(v))
        self.end_headers()
        if body: self.send(data[lo:hi+1])
    def send(self, data):
        for at in range(0, len(data), 4096):
            piece = data[at:at+4096]
            if self.server.left is not None and self.server.left<len(piece): self.close_connection = True; self.connection.shutdown(2); return
            if self.server.left is not None: self.server.left -= len(piece)
            self.wfile.write(piece); self.server.sent += len(piece)
    def listing(self, bucket, prefix, body):
        keys = [p.split('/', 2)[2] for p in self.server.files if p.startswith(f'/{bucket}/') and p.split('/', 2)[2].startswith(prefix)]
        xml = ''.join(f'<Contents><Key>{k}</Key><LastModified>2026-09-01T00:00:00.000Z</LastModified><ETag>"{sha256(self.server.files[f"/{bucket}/{k}"]).hexdigest()[:32]}"</ETag><Size>{len(self.server.files[f"/{bucket}/{k}"])}</Size></Contents>' for k in keys)
        data = f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name><KeyCount>{len(keys)}</KeyCount><IsTruncated>false</IsTruncated>{xml}</ListBucketResult>'.encode()
        self.send_response(200); self.send_header('Content-Length', str(len(data))); self.send_header('Content-Type', 'application/xml'); self.end_headers(); body and self.wfile.write(data)

@pytest.fixture
def server(mini):
    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        def handle_error(self, *a): pass
    s = Quiet(('127.0.0.1', 0), Server); s.files,s.sent,s.left,s.ranges,s.asked = {},0,None,True,[]
    threading.Thread(target=s.serve_forever, daemon=True).start(); s.url = f'http://127.0.0.1:{s.server_port}'
    yield s
    s.shutdown(); s.server_close()

def padded(mini):
    "The first chunk with forty megabytes in it that nobody needs, and the films' own bytes"
    films,out = {n:b for n,b in mini.files.items()},io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        for k,(n,b) in enumerate(sorted(films.items())):
            if k==4: z.writestr('dfdc_train_part_0/raw.bin', np.random.default_rng(0).bytes(40<<20))
            z.writestr(zipfile.ZipInfo(n), b)
    return out.getvalue()

@pytest.fixture
def s3(server, monkeypatch):
    kept = dict(fsspec.config.conf); fsspec.config.conf['s3'] = dict(anon=True, endpoint_url=server.url, client_kwargs=dict(region_name='us-east-1'))
    import s3fs; monkeypatch.setattr(s3fs.S3FileSystem, 'retries', 2); sources._zips.clear() # an open file of another test's server may be among them
    yield 's3://bucket/dfdc'
    fsspec.config.conf.clear(); fsspec.config.conf.update(kept)

@pytest.mark.parametrize('scheme', ['http','s3'])
def test_read_in_place_from_afar(mini, server, s3, tmp_path, scheme):
    "The same shards, byte for byte, and not the whole file for them"
    data = padded(mini); server.files['/bucket/dfdc/00.zip'] = data
    url = {'http':f'{server.url}/bucket/dfdc/00.zip', 's3':f'{s3}/00.zip'}[scheme]
    c, = find_chunks(url); assert c==('00', url)
    r = prepare_chunk(c, tmp_path, **SMALL)
    print(f'{scheme}: {server.sent} of {len(data)} bytes sent')
    assert shards(tmp_path/'00')==shards(mini.home) and [s.name for s in r.quarantine]==['00/raw.bin'] and server.sent<len(data)/6
    sent = server.sent; assert not prepare_chunk(c, tmp_path, **SMALL).fresh and server.sent==sent

def test_a_bucket_is_listed(server, s3):
    for i in (3, 1, 2): server.files[f'/bucket/dfdc/{i:02d}.zip'] = b'x'
    server.files['/bucket/dfdc/readme.txt'] = b'x'
    assert find_chunks(s3, '2,3')==[('02', 's3://bucket/dfdc/02.zip'), ('03', 's3://bucket/dfdc/03.zip')]
    with pytest.raises(ChunkError, match='no chunk 7'): find_chunks(s3, [7])
    with pytest.raises(ChunkError, match='cannot be listed|no chunk there'): find_chunks('s3://elsewhere/x')

def test_two_workers_and_the_background_read_from_afar(mini, server, s3, tmp_path):
    "The settings of fsspec reach the process that prepares, and its workers"
    server.files |= {f'/bucket/dfdc/{z.name}':z.read_bytes() for z in mini.zips[:2]}
    got = [c.name for c,store in ChunkQueue(find_chunks(s3), tmp_path, workers=2, drop=True, **SMALL) if len(store.tracks)==7]
    assert got==['00','01'] and shards(tmp_path/'00')==shards(mini.home) and len(server.files)==2

@pytest.mark.parametrize('scheme', ['http','s3'])
def test_a_server_that_hangs_up(mini, server, s3, tmp_path, scheme):
    "A clear error, nothing half-written, and when the server is well again all is as if nothing had been"
    data = padded(mini); server.files['/bucket/dfdc/00.zip'] = data; url = {'http':f'{server.url}/bucket/dfdc/00.zip', 's3':f'{s3}/00.zip'}[scheme]
    rng,n,good = np.random.default_rng(SEED+9),count(2),0
    for i in range(min(n, 50)):
        server.left = int(rng.integers(0, 3<<20)); store = tmp_path/str(i)
        try: r = prepare_chunk(Chunk('00', url), store, **SMALL)
        except DatasetError as e: assert '00' in str(e), e
        else: assert shards(store/'00')==shards(mini.home), r.quarantine
        for z in (store/'00').glob('[!.]*.zip'): open_shard(z, sealed=True)
        server.left = None
        prepare_chunk(Chunk('00', url), store, **SMALL)
        good += shards(store/'00')==shards(mini.home); assert {s.name for s in prepare_chunk(Chunk('00', url), store, **SMALL).quarantine}=={'00/raw.bin'}
    told(good, min(n, 50), f'broken connections over {scheme} after which the store is the same', SEED)

def test_a_short_breakdown_costs_no_film(mini, server, tmp_path, monkeypatch):
    "A film whose transfer broke is asked for once more; it is not called damaged"
    server.files['/00.zip'] = mini.zips[0].read_bytes(); url = f'{server.url}/00.zip'; real,calls = chunks.build_store,[]
    def flaky(videos, home, **kw):
        calls.append(len(videos))
        if len(calls)==1: server.left = 0; sources._zips.clear()
        try: return real(videos, home, **kw)
        finally: server.left = None
    monkeypatch.setattr(chunks, 'build_store', flaky)
    r = prepare_chunk(Chunk('00', url), tmp_path, **SMALL)
    assert calls==[7, 7] and r.quarantine==[] and shards(r.folder)==shards(mini.home) and seen(r.folder)['store.json']==mini.whole['store.json']

def test_a_film_that_failed_once_is_asked_for_again(mini, server, tmp_path, monkeypatch):
    "Over a network a film is called damaged only after a second try; its fakes are then cut like it after all"
    from deepfake_nb import stores; from deepfake_nb.video import VideoError
    server.files['/00.zip'] = mini.zips[0].read_bytes(); film,build,opened,calls = stores.open_film,chunks.build_store,[],[]
    real = next(v.key for v in mini.report.manifest() if any(f.original==v.key for f in mini.report.manifest()))
    def once(v, *a, **kw):
        opened.append(v.key)
        if v.key==real and opened.count(real)==1: raise VideoError(v.key, 'the line was bad')
        return film(v, *a, **kw)
    monkeypatch.setattr(stores, 'open_film', once); monkeypatch.setattr(chunks, 'build_store', lambda vs, *a, **kw: (calls.append(len(vs)), build(vs, *a, **kw))[1])
    r = prepare_chunk(Chunk('00', f'{server.url}/00.zip'), tmp_path, **SMALL)
    assert calls[0]==7 and 1<calls[1]<7 and r.quarantine==[] and shards(r.folder)==shards(mini.home) and seen(r.folder)['store.json']==mini.whole['store.json']

def test_fetch_goes_on(mini, server, tmp_path):
    data = padded(mini)[:]; server.files['/x/07.zip'] = data; url,digest = f'{server.url}/x/07.zip',sha256(data).hexdigest()
    server.left = 9_000_000
    with pytest.raises(ChunkError, match=r'the connection broke after \d+ of \d+ bytes'): fetch_chunk(url, tmp_path)
    have = (tmp_path/'07.zip.part').stat().st_size; assert 4<<20<=have<9_000_001 and not (tmp_path/'07.zip').exists()
    server.left,before = None,server.sent; told_of = []
    p = fetch_chunk(url, tmp_path, digest, progress=lambda done,total: told_of.append((done, total)))
    assert p.read_bytes()==data and server.sent-before==len(data)-have and told_of[-1]==(len(data),len(data)) and [q.name for q in tmp_path.iterdir()]==['07.zip']
    before = server.sent; assert fetch_chunk(url, tmp_path, digest)==p and server.sent==before
    assert [c.name for c in find_chunks(tmp_path)]==['07']

def test_fetch_refuses(mini, server, tmp_path, monkeypatch):
    data = mini.zips[0].read_bytes(); server.files['/00.zip'] = data; url = f'{server.url}/00.zip'
    with pytest.raises(ChunkError, match='what came is not the file with sha256 0000'): fetch_chunk(url, tmp_path, '0'*64)
    assert not list(tmp_path.glob('*.zip')) and not list(tmp_path.glob('*.part'))
    server.files['/01.zip'] = b'<html>'*100
    with pytest.raises(ChunkError, match='what came is not a whole zip'): fetch_chunk(f'{server.url}/01.zip', tmp_path)
    with pytest.raises(ChunkError, match='out of reach'): fetch_chunk(f'{server.url}/02.zip', tmp_path)
    with pytest.raises(ChunkError, match='not the address of a zip'): fetch_chunk(str(mini.zips[0]), tmp_path)
    (tmp_path/'00.zip').write_bytes(b'mine')
    with pytest.raises(ChunkError, match='is not the file at'): fetch_chunk(url, tmp_path)
    assert (tmp_path/'00.zip').read_bytes()==b'mine'
    (tmp_path/'c').mkdir(); (tmp_path/'c'/'00.zip.part').write_bytes(b'of another version'); assert fetch_chunk(url, tmp_path/'c').read_bytes()==data # a part of unknown origin is not gone on with
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: SimpleNamespace(free=1000))
    with pytest.raises(DiskError, match='are to come, the disk has'): fetch_chunk(url, tmp_path/'d')
    assert not list((tmp_path/'d').glob('*.zip*part'))

# ------------------------------------------------------------------ in the background

def test_prepared_while_the_foreground_works(mini, tmp_path):
    q,ready = ChunkQueue(find_chunks(mini.root, '2,0,1'), tmp_path, **SMALL),{}
    for c,store in q:
        later = q.chunks[q.chunks.index(c)+1:][:1]
        if later: wait_for(lambda: q.ready(later[0]))
        time.sleep(.3); ready[c.name] = [p.parent.name for p in tmp_path.glob('*/prepared.json')]
        assert {t.video.split('/')[3] for t in store.tracks}=={c.name}
    assert list(ready)==['02','00','01'] and [len(r) for r in ready.values()]==[2,3,3] # never more than one ahead
    times = {(w,n):(a,b) for w,n,a,b in q.events}
    assert abs(times['train','02'][0]-times['prepare','00'][0])<.5 and times['prepare','00'][1]<times['train','02'][1] and times['train','00'][0]>times['train','02'][1]-.1
    assert seen(tmp_path/'00')==mini.whole and q.child is None

def test_nothing_ahead(mini, tmp_path):
    q = ChunkQueue(find_chunks(mini.root)[:2], seed(mini, tmp_path, '00'), ahead=0, **SMALL)
    for c,_ in q: assert q.child is None and len(list(tmp_path.glob('*/prepared.json')))==int(c.name)+1

def test_a_child_that_dies_is_told_of(mini, tmp_path):
    q = ChunkQueue(find_chunks(mini.root), seed(mini, tmp_path, '00', '02'), workers=1, **SMALL); it = iter(q); next(it)
    child = q.child; wait_for(lambda: list((tmp_path/'01').glob('*.zip'))); os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChunkError, match=r'chunk 01: the process that prepared it was killed by SIGKILL.*01/prepare.log; mend that') as e: next(it)
    wait_for(lambda: not alive(child.pid), 5)
    kept = identity(tmp_path/'01')
    assert [c.name for c,_ in ChunkQueue(find_chunks(mini.root), tmp_path, **SMALL)]==['00','01','02']
    assert kept and {k:v for k,v in identity(tmp_path/'01').items() if k in kept}==kept

def test_its_last_words_are_passed_on(mini, tmp_path):
    (tmp_path/'01.zip').write_bytes(b'no zip'); shutil.copy2(mini.zips[0], tmp_path/'00.zip')
    got = []; seed(mini, tmp_path/'s', '00')
    with pytest.raises(ChunkError, match=r'ended with status 1\. It said last: .*01\.zip: not a whole archive'):
        for c,_ in ChunkQueue(find_chunks(tmp_path), tmp_path/'s', **SMALL): got.append(c.name)
    assert got==['00']

PARENT = """
import sys,time
from deepfake_nb.chunks import ChunkQueue,find_chunks
q = ChunkQueue(find_chunks(sys.argv[1]), sys.argv[2], size=64, workers=int(sys.argv[3]))
for c,s in q: print(c.name, q.child.pid if q.child else 0, flush=True); time.sleep(300)
"""

@pytest.mark.parametrize('workers', [0, 2])
def test_the_child_ends_with_its_parent(mini, tmp_path, workers):
    shutil.copy2(mini.zips[0], tmp_path); seed(mini, tmp_path/'s', '00'); film = next(iter(names_of(mini).values()))
    (tmp_path/'01.zip').write_bytes(pack({f'p/{i}.mp4':film for i in range(500)}, {f'{i}.mp4':dict(label='REAL') for i in range(500)})) # so that it takes long
    p = subprocess.Popen([sys.executable, '-c', PARENT, tmp_path, tmp_path/'s', str(workers)], env=ENV, stdout=subprocess.PIPE, text=True)
    child = int(p.stdout.readline().split()[1]); wait_for(lambda: (tmp_path/'s'/'01'/'prepare.log').exists() and len(alive(child))>=1+workers)
    if workers: wait_for(lambda: len(alive(child))>=3)
    wait_for(lambda: list((tmp_path/'s'/'01').glob('*.zip')))
    p.kill(); p.wait(); wait_for(lambda: not alive(child), 8)
    assert not (tmp_path/'s'/'01'/'prepared.json').exists()

def test_two_queues_on_one_folder(mini, tmp_path):
    cs = find_chunks(mini.root)[:1]; it = iter(ChunkQueue(cs, seed(mini, tmp_path, '00'), **SMALL)); next(it)
    with pytest.raises(ChunkError, match=rf'are being worked through by process {os.getpid()} \(this one\)'): next(iter(ChunkQueue(cs, tmp_path, **SMALL)))
    assert [c.name for c,_ in ChunkQueue(cs, tmp_path, marks=tmp_path/'run 2', **SMALL)]==['00'] # another training on the same faces
    it.close(); assert [c.name for c,_ in ChunkQueue(cs, tmp_path, **SMALL)]==['00']

# ------------------------------------------------------------------ disk, and what may go

def test_the_disk_is_asked_first(mini, tmp_path, monkeypatch):
    c = Chunk('00', mini.zips[0]); need,took = need_bytes(mini.report.manifest(), Settings(**SMALL)),sum(p.stat().st_size for p in mini.home.glob('*.zip'))
    assert took<=need<1.6*took
    with pytest.raises(DiskError, match=r'faces need about 1\.\d MB, all stores have 0\.0 MB and may have 1\.0 MB'): prepare_chunk(c, tmp_path/'s', disk=1_000_000, **SMALL)
    assert not (tmp_path/'s'/'00').exists()
    prepare_chunk(c, tmp_path/'s', disk=2_000_000, **SMALL)
    with pytest.raises(DiskError, match=r'all stores have 1\.1 MB and may have 2\.0 MB'): prepare_chunk(Chunk('01', mini.zips[1]), tmp_path/'s', disk=2_000_000, **SMALL)
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: SimpleNamespace(free=chunks.RESERVE+1000))
    with pytest.raises(DiskError, match='the disk has 1.1 GB left and 1.1 GB of it are kept free'): prepare_chunk(c, tmp_path/'t', **SMALL)
    assert main(['prepare', str(mini.zips[1]), '--store', str(tmp_path/'s'), '--size', '64', '--disk', '1MB'])==1

def test_the_limit_holds_while_it_is_written(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, 'need_bytes', lambda *a: 0)
    with pytest.raises(DiskError, match='the estimate was too low'): prepare_chunk(Chunk('00', mini.zips[0]), tmp_path, disk=500_000, **SMALL)
    assert 3<=len(shards(tmp_path/'00'))<=4 and not (tmp_path/'00'/'prepared.json').exists()

def test_a_full_disk_is_no_broken_film(mini, tmp_path, monkeypatch):
    from deepfake_nb import clips
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(clips, 'atomic_write', full)
    with pytest.raises((DiskError, StoreError), match='No space left'): prepare_chunk(Chunk('00', mini.zips[0]), tmp_path, tolerate=1, **SMALL)
    assert not (tmp_path/'00'/'quarantine.json').exists() and not (tmp_path/'00'/'prepared.json').exists()

DROP = """
import os,signal,sys
from deepfake_nb import chunks,sources
from deepfake_nb.chunks import ChunkQueue,find_chunks
def kill(*a): os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3]=='before': chunks.write_json = kill
if sys.argv[3]=='between': ChunkQueue._drop = kill
if sys.argv[3]=='source': ChunkQueue._drop_store = kill
q = ChunkQueue(find_chunks(sys.argv[1]), sys.argv[2], ahead=0, drop=True, drop_store=True, size=64)
for c,s in q: q.done(c)
"""

@pytest.mark.parametrize('when', ['before','between','source'])
def test_killed_between_done_and_drop(mini, tmp_path, when):
    "The zip is there unless `done` is on the disk; a deletion that was not made is made at the next start"
    for z in mini.zips[:2]: shutil.copy2(z, tmp_path)
    first = find_chunks(tmp_path); store = seed(mini, tmp_path/'s', '00', '01')
    p = subprocess.run([sys.executable, '-c', DROP, tmp_path, store, when], env=ENV, capture_output=True); assert p.returncode==-signal.SIGKILL, p.stderr
    marked,there,faces = (store/'00'/'done.json').exists(),(tmp_path/'00.zip').exists(),bool(list((store/'00').glob('*.zip')))
    assert (marked,there,faces)=={'before':(False,True,True), 'between':(True,True,True), 'source':(True,False,True)}[when]
    q = ChunkQueue(first, store, ahead=0, drop=True, drop_store=True, **SMALL); names = []
    for c,_ in q: names.append(c.name); q.done(c)
    assert names==(['00','01'] if when=='before' else ['01']) and [c.name for c in q.finished]==['00','01']
    assert not list(tmp_path.glob('*.zip')) and not list(store.glob('*/*.zip')) and all((store/n/'quarantine.json').exists() for n in ('00','01'))
    assert list(ChunkQueue(first, store, drop=True, drop_store=True, **SMALL))==[]

def test_done_is_durable_before_anything_goes(mini, tmp_path, monkeypatch):
    "In the order of the system calls: the mark and its folders are on the disk, then the zip goes"
    for z in mini.zips[:1]: shutil.copy2(z, tmp_path)
    q,calls = ChunkQueue(find_chunks(tmp_path), seed(mini, tmp_path/'s', '00'), drop=True, **SMALL),[]
    for c,_ in q:
        fsync,unlink,replace = os.fsync,Path.unlink,os.replace
        monkeypatch.setattr(os, 'fsync', lambda fd: (calls.append(('fsync', Path(os.readlink(f'/proc/self/fd/{fd}')).name)), fsync(fd)))
        monkeypatch.setattr(Path, 'unlink', lambda self, **kw: (calls.append(('unlink', self.name)), unlink(self, **kw))[1])
        monkeypatch.setattr(os, 'replace', lambda a, b: (calls.append(('replace', Path(b).name)), replace(a, b)))
        assert q.done(c, step=7)==mini.zips[0].stat().st_size; monkeypatch.undo()
    order = [x if not x[1].startswith('.done') else (x[0], 'part') for x in calls]
    keys = [('fsync','part'),('replace','done.json'),('fsync','00'),('fsync','s'),('unlink','00.zip')]
    assert [order.index(k) for k in keys]==sorted(order.index(k) for k in keys)
    assert json.loads((tmp_path/'s'/'00'/'done.json').read_text())['note']==dict(step=7)

def test_what_is_not_dropped(mini, tmp_path):
    "An address, a folder, a link, a zip that is another one by now: they stay"
    root = miniature('dfdc', tmp_path/'f', parts=1, zipped=False); shutil.copy2(mini.zips[1], tmp_path/'real.zip'); (tmp_path/'01.zip').symlink_to(tmp_path/'real.zip'); shutil.copy2(mini.zips[2], tmp_path/'02.zip')
    q = ChunkQueue(find_chunks([root, tmp_path/'01.zip', tmp_path/'02.zip']), tmp_path/'s', drop=True, **SMALL)
    for c,_ in q:
        if c.name=='02': (tmp_path/'02.zip').write_bytes(b'another')
        if c.name=='02':
            with pytest.raises(ChunkError, match='not prepared'): q.done(c)
            shutil.copy2(mini.zips[2], tmp_path/'02.zip')
            write = chunks.write_json
            try: chunks.write_json = lambda p, d: (write(p, d), (tmp_path/'02.zip').write_bytes(b'another'))[0]; assert q.done(c)==0
            finally: chunks.write_json = write
        else: assert q.done(c)==0
    assert (root/'dfdc_train_part_0'/'metadata.json').exists() and (tmp_path/'01.zip').is_symlink() and (tmp_path/'02.zip').read_bytes()==b'another'
    assert [s.split(': ')[1] for s in q.said]==['01.zip is no plain zip, it stays', '02.zip is not the file that was prepared, it stays']

def test_done_with_other_settings(mini, tmp_path):
    cs = find_chunks(mini.root)[:1]; q = ChunkQueue(cs, seed(mini, tmp_path, '00'), **SMALL)
    for c,_ in q: q.done(c.name)
    with pytest.raises(ChunkError, match='done with other settings'): list(ChunkQueue(cs, tmp_path, size=96))
    with pytest.raises(ChunkError, match='no chunk .* in this queue'): q.done('05')

# ------------------------------------------------------------------ the command

def test_the_command(mini, tmp_path):
    run = lambda *a: subprocess.run([sys.executable, '-m', 'deepfake_nb.chunks', *map(str, a)], env=ENV, capture_output=True, text=True)
    p = run('prepare', mini.root, '--store', tmp_path, '--order', '2,0', '--size', 64, '--spans', 1, '--span', 8)
    assert p.returncode==0 and p.stdout=='chunk 02: 7 videos, 0 quarantined\nchunk 00: 7 videos, 0 quarantined\n', p.stderr
    assert {t.frames for t in FaceStore(tmp_path/'02').tracks}=={8}
    s = run('status', tmp_path); assert s.returncode==0 and [l.split()[:3] for l in s.stdout.splitlines()[2:]]==[['00','prepared','7'],['02','prepared','7']]
    p = run('prepare', mini.root, '--store', tmp_path, '--order', '7'); assert p.returncode==1 and p.stderr.startswith('ChunkError: no chunk 7 in')
    assert run('prepare', mini.root).returncode==2 and run('prepare', mini.root, '--store', tmp_path, '--disk', 'much').returncode==2 and run('preprae').returncode==2
