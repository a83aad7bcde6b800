"Detect against hostile files, hostile readers and bad luck: each ends as one error that names the file, promptly, with nothing left running"
import json,os,signal,struct,subprocess,sys,threading,time
from dataclasses import replace
from fractions import Fraction
from http.server import BaseHTTPRequestHandler,HTTPServer,ThreadingHTTPServer
from pathlib import Path
from unittest import mock
import av,numpy as np,pandas as pd,PIL.Image,pytest,torch
from common import count,told,wait_for
import deepfake_nb.detect as D
from deepfake_nb.detect import CANT,DetectError,Limits,detect,detect_main,probe
from deepfake_nb.export import Calibration,Exported
from deepfake_nb.pack import sample
from deepfake_nb.scoring import Detector
from deepfake_nb.stf_mamba import STFConfig,build_stf_mamba
from deepfake_nb.video import VideoFile,write_video

def kids():
    "Processes that this one has started and that are still there"
    return [int(p) for t in Path('/proc/self/task').iterdir() for p in (t/'children').read_text().split()]

@pytest.fixture(autouse=True)
def nothing_left():
    before = kids(); yield
    assert set(kids())<=set(before)

@pytest.fixture(scope='module')
def asked():
    torch.manual_seed(0); m = build_stf_mamba(STFConfig.phase_a('demo'), 'pack'); d = Detector(m, 'Phase A', 'STFMamba', 4, (), '0'*64)
    r = np.random.default_rng(0); t = pd.DataFrame(dict(video=[f'v{i}' for i in range(80)], label=[0,1]*40, group=[f'g{i//2%20}' for i in range(80)], score=np.r_[r.uniform(.2, .9, 80)]))
    return Exported(None, d, {'A':d}, None, Calibration(t, 'drawn', None, True, 'drawn'), {}, dict(name='A', qp=[23,40]))

def fails(path, exported, words, seconds=20, reader=None, **kw):
    "An error with the file's name and these words, in time"
    began = time.monotonic()
    with pytest.raises(DetectError) as e, mock.patch.object(D, 'READER', reader or D.READER): detect(path, exported, limits=Limits(**kw))
    assert Path(path).name in str(e.value) and words in str(e.value) and 'Remedy: ' in str(e.value), str(e.value)
    assert time.monotonic()-began<seconds and '\n' not in str(e.value)

WOMAN = sample('woman').read_bytes()
Y4M = b'YUV4MPEG2 W%d H%d F25:1 Ip A1:1 C420jpeg\nFRAME\n'%(12_000,12_000)+bytes(1000)

FILES = dict(truncated=(WOMAN[:5000],'cannot be read'), empty=(b'','empty'), zeros=(bytes(100_000),'cannot be read'), noise=(np.random.default_rng(0).bytes(100_000),'cannot be read'), text=(b'hello\n'*1000,'cannot be read'),
    concat=(b'ffconcat version 1.0\nfile /etc/hostname\n','cannot be read'), playlist=(b'#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n','cannot be read'),
    huge=(Y4M,'12000 x 12000'), elf=(Path('/bin/true').read_bytes()[:50_000],'cannot be read'))

@pytest.mark.parametrize('kind', FILES)
def test_hostile_files(kind, tmp_path, asked, capsys):
    data,words = FILES[kind]; p = tmp_path/f'{kind}.mp4'; p.write_bytes(data); fails(p, asked, words)
    assert detect_main([str(p)])==1 and f'{kind}.mp4: ' in capsys.readouterr().err # and without a model in sight

def test_endless(tmp_path, asked):
    "A clock that never ends, by its header or by its frames"
    im = VideoFile(sample('carphone')).read(0, 3)[0]; fails(write_video(tmp_path/'long.mkv', im, times=[0,.04,90_000.]), asked, 'seconds, the cap is 3600')
    i = WOMAN.index(b'mvhd'); p = tmp_path/'years.mp4'; p.write_bytes(WOMAN[:i+20]+b'\xff'*4+WOMAN[i+24:]); v = detect(p, asked, every=9).report
    assert v['video']['seconds']<20 and v['score'] is not None # a header may say what it likes

def test_no_files(tmp_path, asked):
    os.mkfifo(tmp_path/'pipe.mp4'); (tmp_path/'folder.mp4').mkdir(); (tmp_path/'half.mp4.part').write_bytes(WOMAN)
    fails(tmp_path/'pipe.mp4', asked, 'no file but a pipe', 2); fails(tmp_path/'folder.mp4', asked, 'it is a folder', 2); fails(tmp_path/'gone.mp4', asked, 'cannot be opened', 2)
    fails(tmp_path/'half.mp4.part', asked, 'unfinished copy', 2); fails('/dev/zero', asked, 'a device', 2); fails(sample('woman'), asked, 'the cap is 1000', 2, bytes=1000)

def test_bytes_turned_over(tmp_path, asked):
    "A broken file is an error or a verdict that counts what is lost; it is never a hang and never a traceback"
    n = count(4); good = 0
    for i in range(n):
        r = np.random.default_rng(i); b = bytearray(sample('man').read_bytes()); k = int(r.integers(len(b))); m = int(r.integers(1, 3000)); b[k:k+m] = r.bytes(len(b[k:k+m])); p = tmp_path/f'{i}.mp4'; p.write_bytes(b)
        try: v = detect(p, asked).report; good += v['video']['frames']+v['video']['lost']>0 and v['answer'] in ('real','fake',CANT)
        except DetectError as e: good += f'{i}.mp4' in str(e)
    told(good, n, 'damaged files end in order', 0)

HEAD = 'import sys,os,json,struct,time; sys.path.append(sys.argv[1]); import deepfake_nb.detect as d; fd,out,spec = int(sys.argv[2]),int(sys.argv[3]),sys.argv[4]\n'
RUN = 'd.reader_main(fd, out, spec)'
def tracks(body): return HEAD+'def bad(*a, **k):\n '+body+'\n yield\nd.face_tracks = bad\n'+RUN

BAD = dict(hangs=('time.sleep(1000)','said nothing for 2 s',dict(silence=2)), eats=('x = [bytearray(1<<28) for _ in range(100)]','needs more than the 1500 MB',dict(memory=1500<<20)), spins=('while True: pass','more than 2 s of processor time',dict(cpu=2)),
    crashes=('os.abort()','crashed with SIGABRT',{}), killed=('os.kill(os.getpid(), 9)','was killed',{}), quits=('os._exit(3)','ended early (exit code 3)',{}), raises=('raise ZeroDivisionError("odd")','ZeroDivisionError: odd',{}),
    reads=('open("/etc/hostname")','Permission denied',{}), writes=('open("/tmp/left-behind", "w")','Permission denied',{}), forks=('os.execv("/bin/true", ["true"])','Permission denied',{}),
    calls=('import socket; socket.create_connection(("127.0.0.1", 9), 2)','Error',{}))

@pytest.fixture(scope='module')
def walled(): return subprocess.run([sys.executable,'-I','-c','import deepfake_nb.detect as d,sys; d._LIBC.prctl(38, 1, 0, 0, 0); sys.exit(not d._no_files())']).returncode==0

@pytest.mark.parametrize('kind', BAD)
def test_bad_readers(kind, asked, walled):
    if kind in ('reads','writes','forks') and not walled: pytest.skip('this kernel has no Landlock, and the report says so')
    body,words,kw = BAD[kind]; fails(sample('woman'), asked, words, 15, tracks(body), **kw)

def msg(text, body=b'', size=None, mark=b'dfnb'): t = text if isinstance(text, bytes) else json.dumps(text).encode(); return struct.pack('<4sIQ', mark, len(t), len(body) if size is None else size)+t+body
READY,FILM = msg(dict(kind='ready', arrays={}, sandbox={})),msg(dict(kind='film', arrays={}, seconds=9, rate=25, width=64, height=64, codec='x', sound=False, still=False, streams=1, due=9))
SHAPES = dict(frames=['|u1',[4,224,224,3]], landmarks=['<f4',[4,468,2]], boxes=['<f4',[4,4]], transforms=['<f4',[4,2,3]], times=['<f8',[4]], presence=['<f4',[4]])
def clip(number=0, at=0., shapes=SHAPES, times=None, **kw):
    t = np.arange(4)/25+at if times is None else times; body = b''.join((np.asarray(t, d) if k=='times' else np.zeros(s, d)).tobytes() for k,(d,s) in SHAPES.items())
    return msg(dict(kind='clip', arrays=shapes, number=number, start=0)|kw, body)

LIES = dict(noise=b'\0'*100, text=b'HTTP/1.1 200 OK\r\n\r\n', long_head=struct.pack('<4sIQ', b'dfnb', 1<<31, 0), long_body=struct.pack('<4sIQ', b'dfnb', 2, 1<<60)+b'{}', no_json=msg(b'{'), deep=msg(b'['*60_000), a_list=msg([]), unknown=msg(dict(kind='exec', arrays={})), lacking=msg(dict(kind='ready', arrays={})),
    clip_first=READY+clip(), twice=READY+FILM+FILM, nan_size=READY+msg(dict(kind='film', arrays={}, seconds=float('nan'), rate=25, width=64, height=64, codec='x', sound=False, still=False, streams=1, due=9)),
    negative=READY+FILM+clip(shapes=SHAPES|dict(frames=['|u1',[-4,224,224,3]])), objects=READY+FILM+clip(shapes=SHAPES|dict(times=['|O',[4]])), longer=READY+FILM+clip(shapes=SHAPES|dict(frames=['|u1',[400,224,224,3]])), other=READY+FILM+clip(shapes=SHAPES|dict(more=['|u1',[4]])),
    nan=READY+FILM+clip(times=[0,1,np.nan,2]), back=READY+FILM+clip(times=[3,2,1,0]), late=READY+FILM+clip(at=1e6), same=READY+FILM+clip()+clip(), bool_number=READY+FILM+clip(number=True), name=READY+FILM+clip(number='0'),
    no_box=msg(dict(kind='ready', arrays={}, sandbox=[1])), no_count=READY+FILM+msg(dict(kind='end', arrays={}, frames=1, time=1, shown=1, lost=1, why=dict(x='y'), qp=None, packed=1, silent='')),
    endless_at=READY+FILM+msg(dict(kind='at', arrays={}, time=1, frames=5))*2, unasked=READY+FILM+msg(dict(kind='at', arrays=dict(x=['|u1',[3]]), time=1, frames=5), b'abc'))

@pytest.mark.parametrize('kind', LIES)
def test_liars(kind, asked):
    fails(sample('woman'), asked, 'broke the protocol', 10, f'import os,sys,time; os.write(int(sys.argv[3]), {LIES[kind][:60_000]!r})\nfor i in range(0, {len(LIES[kind])}-60000, 60000): os.write(int(sys.argv[3]), bytes(60000))\ntime.sleep(1000)' if len(LIES[kind])<60_000
        else f'import os,sys,time\nfor i in range(0, len(x := {LIES[kind]!r}), 60000): os.write(int(sys.argv[3]), x[i:i+60000])\ntime.sleep(1000)' if len(LIES[kind])<100_000 else _from_file(LIES[kind]))

def _from_file(data):
    import tempfile
    with tempfile.NamedTemporaryFile(delete=False) as f: f.write(data)
    return f'import os,sys,time\nx = open({f.name!r}, "rb").read(); os.unlink({f.name!r})\nwhile x: x = x[os.write(int(sys.argv[3]), x):]\ntime.sleep(1000)'

def test_floods(asked):
    "Endless messages, each of them in order, come to an end"
    more = '\nout = int(sys.argv[3])\ndef w(x):\n while x: x = x[os.write(out, x):]\ndef m(**d): t = json.dumps(d|dict(arrays={})).encode(); w(struct.pack("<4sIQ", b"dfnb", len(t), 0)+t)\n'
    start = HEAD+more+f'w({READY+FILM!r})\nn = 0\nwhile True:\n n += 1; '
    fails(sample('woman'), asked, 'more than 20 faces', 20, start+'m(kind="passed", number=n, first=0, last=1, frames=5, face_px=9, reason="too short")', faces=20)
    fails(sample('woman'), asked, 'said nothing for 2 s', 20, HEAD+'for b in b"dfnb"*1000: os.write(out, bytes([b])); time.sleep(.5)', silence=2)

def test_killed_midway(asked):
    n = count(2); good = 0
    for i in range(n):
        def kill(at, total, m):
            if m is not None and m.t0>=i%10: [os.kill(p, 9) for p in kids()]
        with pytest.raises(DetectError) as e: detect(sample('woman'), asked, progress=kill)
        good += 'was killed' in str(e.value)
    told(good, n, 'readers killed midway end as an error', 0)

def test_dies_with_its_parent(tmp_path):
    "A parent that is killed leaves no reader behind"
    code = f'import os,time,sys\nfrom deepfake_nb.detect import _Reader,_open,Limits\nfd = _open({str(sample("woman"))!r}, "x", Limits()); r = _Reader(fd, "x", Limits()); r.message(); print(r.process.pid, flush=True); time.sleep(1000)'
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True); kid = int(p.stdout.readline()); p.kill(); p.wait(); p.stdout.close()
    wait_for(lambda: not Path(f'/proc/{kid}').exists() or 'zombie' in Path(f'/proc/{kid}/status').read_text(), 10)

def test_a_clean_house(asked):
    "The reader gets no secret, no descriptor but the file and the pipe, and what the report says of its prison is so"
    secret = 'k-'+'0123456789abcdef'*2; body = 'raise ValueError(repr((sorted(os.environ), sorted(os.readlink(f"/proc/self/fd/{x}").split(":")[0] for x in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{x}")))))'
    r,w = os.pipe(); os.set_inheritable(w, True)
    try:
        with mock.patch.dict(os.environ, RUNPOD_API_KEY=secret, AWS_SECRET_ACCESS_KEY=secret), pytest.raises(DetectError) as e, mock.patch.object(D, 'READER', HEAD+body.replace('raise ', 'e = ')+'\nd._send(os.fdopen(out, "wb"), "error", reason=str(e))'): detect(sample('woman'), asked)
    finally: os.close(r); os.close(w)
    assert 'KEY' not in str(e.value) and secret not in str(e.value) and 'DEEPFAKE_NB_HOME' in str(e.value)
    assert str(e.value).count('pipe')==1 and str(e.value).count('woman.mp4')<=2
    box = detect(sample('man'), asked).report['sandbox']
    assert box['no_new_privileges'] and box['dies_with_parent'] and box['memory']==Limits().memory

def test_changed_while_read(tmp_path, asked):
    p = tmp_path/'growing.mp4'; p.write_bytes(WOMAN)
    def grow(at, total, m): p.open('ab').write(b'x')
    with pytest.raises(DetectError, match='growing.mp4: it was changed while it was read'): detect(p, asked, progress=grow)

def test_stills(tmp_path, asked):
    "A picture is a film of one frame: a detector of clips can't tell, one of images can; turned by EXIF it is judged upright"
    im = VideoFile(sample('woman')).read(0, 1)[0][0]; one = Exported(None, d1 := Detector(build_stf_mamba(replace(STFConfig.phase_a('demo'), stages=0, mixer='none', ffn='none', dwt=False, hll_gate=False, hll_loss='none'), 'pack'), 'images', 'STFMamba', 1), {'A':d1}, None, asked.calibration, {}, dict(name='A'))
    boxes = {}
    for k,(fmt,turn) in dict(jpeg=(1,0), png=(1,0), webp=(1,0), turned=(6,1)).items():
        x = PIL.Image.Exif(); x[274] = fmt; p = tmp_path/f'{k}.{"jpg" if k in ("jpeg","turned") else k}'; PIL.Image.fromarray(np.rot90(im, turn)).save(p, exif=x.tobytes(), **dict(lossless=True) if k=='webp' else dict(quality=95) if k in ('jpeg','turned') else {})
        v,w = detect(p, one).report,detect(p, asked).report; boxes[k] = v['tracks'][0]['timeline'][0]['box']
        assert v['score'] is not None and v['tracks'][0]['clips']==1 and v['video']['still'] and v['video']['qp'] is None
        assert w['answer']==CANT and 'consecutive frames' in w['reason'] and 'single picture' in w['reason']
    assert np.ptp(list(boxes.values()), 0).max()<.02
    PIL.Image.fromarray(im).resize((4032,2268)).save(tmp_path/'phone.jpg'); PIL.Image.fromarray(im).save(tmp_path/'one.gif') # more pixels than a film may have; one picture in a container for films
    for n in ('phone.jpg','one.gif'): assert (v := detect(tmp_path/n, one).report)['video']['still'] and v['tracks'][0]['clips']==1
    fails(tmp_path/'phone.jpg', one, '--limit pixels=N', stills=10**6, pixels=10**6)

@pytest.fixture
def shop(tmp_path, asked, capsys, monkeypatch):
    "`deepfake-nb detect` in a folder of its own, with a model: code, standard output, standard error"
    import deepfake_nb.export as X
    monkeypatch.setattr(X, 'load_exported', lambda folder, device='cpu': asked); (tmp_path/'m').mkdir(); (tmp_path/'films').mkdir(); monkeypatch.chdir(tmp_path)
    return lambda *words: (detect_main([*map(str, words), '--model', 'm']), *capsys.readouterr())

def film(name): p = Path('films')/name; p.write_bytes(MAN); return p
MAN = sample('man').read_bytes()

def test_main(shop):
    "A folder: each file a verdict, errors counted, others left; the exit code of the worst"
    film('a.mp4'); Path('films/b.mp4').write_bytes(b'no film'); Path('films/c.txt').write_text('x'); c,out,err = shop('films', '--json', 'out.json', '--html', 'pages'); got = {g['path']:g for g in json.loads(Path('out.json').read_text())}
    assert c==1 and got['b.mp4']['answer'] is None and got['a.mp4']['format']=='deepfake_nb verdict 1' and got['a.mp4']['html']=='000-a.html' and Path('pages/000-a.html').exists() and got['a.mp4']['folder']=='films'
    assert 'of another kind: c.txt' in out and 'could not be read' in out and 'b.mp4: ' in err and 'Traceback' not in err and got['c.txt']['skipped']=={'of another kind':1}
    assert 'at most 5 % of reals called fake' in out and got['a.mp4']['asked']==dict(every=1., false_alarms=.05, misses=.05, rehearse=False) and 'do not act on it' in shop('films/a.mp4', '--rehearse')[1]
    c,out,err = shop('films/a.mp4', '--json', '-', '--quiet'); assert c in (0,3,4) and json.loads(out)['file']['name']=='a.mp4'
    assert D._code(['real','real'])==0 and D._code([CANT,'real'])==4 and D._code(['could not be read',CANT])==1 and D._code(['fake','could not be read',CANT])==3

def test_nothing_is_left_out_in_silence(shop):
    "What a folder holds and is not judged is named; what cannot be read is an error"
    for n in ('a.mp4','.hidden.mp4','b.mp4.part','noext'): film(n)
    os.symlink('/nowhere', 'films/broken.mp4'); os.mkfifo('films/pipe.mp4'); Path('empty').mkdir(); Path('else').mkdir(); os.symlink(Path('else').resolve(), 'films/link'); Path('films/.git').mkdir(); film('.git/x.mp4')
    c,out,err = shop('films', 'empty', '--json', 'o.json'); rest = {g['path']:g.get('skipped') or g.get('error') for g in json.loads(Path('o.json').read_text())}
    assert c==1 and 'broken.mp4: it cannot be opened' in err and 'pipe.mp4: it is no file' in err and 'empty: no video or image in it' in err
    assert {k:next(iter(v)) for k,v in rest.items() if v and 'reason' not in v}=={'.hidden.mp4':'hidden', '.git':'hidden', 'b.mp4.part':'an unfinished copy', 'noext':'of another kind', 'link':'a link to a folder'} and 'not looked at, hidden: .git, .hidden.mp4' in out
    assert D._walk('gone') and 'cannot be opened' in str([e for _,e,_ in D._walk('gone')][0])

def test_odd_names(shop):
    "Bytes that are no text, and letters that move the cursor"
    open(os.fsencode('films')+b'/a\xff.mp4', 'wb').write(MAN); film('b\x1b[2J\nreal.mp4: real.mp4'); c,out,err = shop('films', '--json', 'o.json', '--html', 'h')
    assert c in (0,3,4) and 'a?.mp4: ' in out and 'b?[2J?real' in out and '\x1b' not in out+err and len(os.listdir('h'))==2
    assert (Path('films')/json.loads(Path('o.json').read_text())[0]['path']).read_bytes()==MAN # the true name

def test_outputs(shop):
    "The evidence is not written over, and what cannot be written is found out before the first verdict"
    a,b = film('a.mp4'),film('plain'); os.link(b, 'twin'); Path('x').write_text('x')
    for words in ((a,'--json',a), (a,'--html',a), (b,'--json',b), (b,'--json','twin'), (a,'--json','o','--html','o'), (a,'--json','films'), (a,b,'--html','x'), (a,'--json','x/y.json'), (a,'--json','/dev/null'), (a,'--html','new.webm')):
        c,out,err = shop(*words); assert c==2 and not out and err.startswith('deepfake-nb detect: ') and 'Remedy: name another place' in err, words
    assert a.read_bytes()==b.read_bytes()==MAN and Path('/dev/null').is_char_device()
    Path('h').mkdir(); assert shop(a, '--html', 'h')[0] in (0,3,4) and os.listdir('h')==['000-a.html']
    for words in ((a,'--limit','speed=3'), (a,'--limit','bytes=-1'), (a,'--limit','bytes'), (a,'--every','inf')): assert shop(*words)[0]==2
    c,_,err = shop(a, '--limit', 'bytes=1000'); assert c==1 and 'the cap is 1000. Remedy: raise Limits.bytes (--limit bytes=N)' in err
    Path('bad.mp4').write_bytes(b'x'); assert detect_main(['bad.mp4', 'bad.mp4'])==1 # no model is asked for

def test_what_nobody_foresaw(shop, monkeypatch, capsys):
    "An odd error is that file's alone; Ctrl-C leaves what was judged"
    for n in 'abc': film(f'{n}.mp4')
    real = D.detect
    def odd(what):
        def f(path, *a, **kw):
            if path.endswith('b.mp4'): raise what
            return real(path, *a, **kw)
        monkeypatch.setattr(D, 'detect', f)
    odd(ZeroDivisionError('x')); c,_,err = shop('films', '--json', 'o.json'); got = json.loads(Path('o.json').read_text())
    assert c in (1,3) and [g['answer'] is None for g in got]==[False,True,False] and 'ZeroDivisionError' in got[1]['error']['reason'] and 'Traceback' not in err
    odd(KeyboardInterrupt()); write,before = D._write_json,signal.getsignal(signal.SIGINT) # under nohup it is ignored
    def hasty(*a): [os.kill(os.getpid(), s) for s in (signal.SIGINT,signal.SIGTERM)]; time.sleep(.1); write(*a)
    monkeypatch.setattr(D, '_write_json', hasty)
    with pytest.raises(KeyboardInterrupt): shop('films', '--json', 'p.json')
    got = json.loads(Path('p.json').read_text()); assert [(g['path'], bool(g['answer']), g.get('error', {}).get('reason')) for g in got]==[('a.mp4',True,None),('b.mp4',False,D.CUT),('c.mp4',False,D.CUT)]
    assert f'    2  {D.CUT}' in capsys.readouterr().out and signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt): shop('films/b.mp4', '--json', 'q.json')
    assert json.loads(Path('q.json').read_text())['error']['reason']==D.CUT # one file alone: no older report stays in its place

def test_terminated(tmp_path):
    "SIGTERM in mid-download: nothing is left"
    class H(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.send_header('Content-Length', str(1<<30)); self.end_headers()
            for _ in range(1000): self.wfile.write(bytes(1<<16)); time.sleep(.05)
        def log_message(self, *a): pass
    s = ThreadingHTTPServer(('127.0.0.1', 0), H); s.handle_error = lambda *_: None; threading.Thread(target=s.serve_forever, daemon=True).start(); code = 'import sys,deepfake_nb.detect as D\nD._load = lambda folder: None\nsys.exit(D.detect_main(sys.argv[1:]))'
    p = subprocess.Popen([sys.executable, '-c', code, f'http://127.0.0.1:{s.server_address[1]}/a.mp4', '--allow-url', '--model', 'm', '--json', str(tmp_path/'o.json')], env=os.environ|dict(TMPDIR=str(tmp_path)), stderr=subprocess.PIPE)
    try: wait_for(lambda: any(f.stat().st_size for f in tmp_path.glob('*/file'))); p.terminate(); assert p.wait()==143 and not list(tmp_path.glob('*/file'))
    finally: p.kill(); p.wait(); p.stderr.close(); s.shutdown(); s.server_close()

def always(asked, word):
    "The same detector with thresholds that give everything one answer"
    r = np.random.default_rng(0); lo,hi = dict(real=((0,.1),(.98,1)), fake=((0,.001),(0,.002)))[word]
    t = pd.DataFrame([dict(label=y, group=f'{y}{i}', score=r.uniform(*(lo,hi)[y])) for y in (0,1) for i in range(200)]); return Exported(None, asked.detector, asked.members, None, Calibration(t, 'drawn'), {}, dict(name='A'))

def mux(path, streams):
    with av.open(str(path), 'w') as o:
        ss = []
        for f in streams: x = o.add_stream('libx264', rate=25); x.width,x.height,x.pix_fmt,x.options = f.shape[2],f.shape[1],'yuv420p',dict(preset='ultrafast'); ss.append(x)
        for x,f in zip(ss, streams):
            for i,im in enumerate(f): v = av.VideoFrame.from_ndarray(np.ascontiguousarray(im), format='rgb24'); v.pts,v.time_base = i,Fraction(1, 25); o.mux(x.encode(v))
            o.mux(x.encode(None))
    return path

def test_what_was_not_seen_is_not_real(tmp_path, asked):
    "A size that changes in mid-film, a second stream: no bare 'real'; a pause loses nothing"
    man = VideoFile(sample('man')).read(0, 40)[0]; yes,no = always(asked, 'real'),always(asked, 'fake'); assert detect(sample('man'), yes).answer=='real' and detect(sample('man'), no).answer=='fake'
    small,big = mux(tmp_path/'a.ts', [man]),mux(tmp_path/'b.ts', [np.pad(man, ((0,0),(0,16),(0,16),(0,0)))]); p = tmp_path/'sizes.ts'; p.write_bytes(small.read_bytes()+big.read_bytes()); r = detect(p, yes).report
    assert r['answer']==CANT and 'too much of it is lost' in r['reason'] and r['video']['lost']>.1*r['video']['frames'] and 'frames could not be used' in D._text(r)
    two = mux(tmp_path/'two.mkv', [man, man]); r = detect(two, yes).report; assert r['answer']==CANT and '1 of 2 video streams' in r['reason'] and '1 of 2 video streams' in ' '.join(r['limits']) and r['skipped']['video stream that is not the first']==1
    assert detect(two, no).answer=='fake'
    half = tmp_path/'half.mkv'; half.write_bytes((b := mux(tmp_path/'whole.mkv', [np.concatenate([man]*3)]).read_bytes())[:len(b)//3]); r = detect(half, yes).report; assert r['answer']==CANT and 'its header promises 4.8 s' in r['reason'] and detect(tmp_path/'whole.mkv', yes).answer=='real' and detect(half, no).answer=='fake'
    t = np.arange(40)/25+30*(np.arange(40)//14); r = detect(write_video(tmp_path/'pause.mkv', man, times=t, codec='libvpx-vp9', qp=30), yes).report
    assert r['answer']=='real' and r['video']['lost']==0 and r['video']['missing']>1000 and r['video']['bits_per_pixel']>.01 and 'times have no frame' in ' '.join(r['limits'])

def remux(src, to, hold=0, shift=0, sound=0, **options):
    "The same pictures, the last held for `hold` s, all of them `shift` s later, with `sound` s of silence"
    with av.open(str(src)) as i, av.open(str(to), 'w', options=options) as o:
        s = i.streams.video[0]; v,a = o.add_stream_from_template(s),o.add_stream('aac', rate=16000, layout='mono') if sound else None; got = [p for p in i.demux(s) if p.size]; by = int(shift/s.time_base)
        if hold: max(got, key=lambda p: p.pts).duration = got[-1].duration = int(hold/s.time_base)
        for p in got: p.pts,p.dts,p.stream = p.pts+by,p.dts+by,v
        for k in range(0, int(16000*sound), 1024): f = av.AudioFrame.from_ndarray(np.zeros((1,1024), np.float32), 'fltp', 'mono'); f.sample_rate,f.time_base,f.pts = 16000,Fraction(1, 16000),k; got += a.encode(f)
        for p in sorted(got+(a.encode(None) if a else []), key=lambda p: p.dts*p.time_base): o.mux(p)
    return to

def test_whole_files(tmp_path, asked):
    "A last picture that is held, sound that goes on, a film that begins late, the transparency of an AVIF: 'real' can be said of them, and not of a part of them"
    man,yes = VideoFile(sample('man')).read(0, 40)[0],always(asked, 'real'); film = mux(tmp_path/'film.mp4', [man]); pics = [PIL.Image.fromarray(f) for f in man[:20]]; half = tmp_path/'half'
    pics[0].save(tmp_path/'held.gif', save_all=True, append_images=pics[1:], duration=[40]*19+[3000])
    for p,long in ((tmp_path/'held.gif', 3.76), (remux(film, tmp_path/'held.mp4', hold=3), 4.5), (remux(film, tmp_path/'sound.mkv', sound=5), 1.6), (remux(film, tmp_path/'late.mkv', shift=3), 1.6), (remux(film, tmp_path/'late.mp4', shift=3, sound=5), 1.6)):
        v = detect(p, yes).report; assert v['answer']=='real' and abs(v['video']['end']-v['video']['due'])<.1 and abs(v['video']['due']-long)<.15, (p.name, v['answer'], v['reason'], v['video'])
    for p in (remux(film, tmp_path/'front.mp4', shift=3, sound=5, movflags='faststart'), tmp_path/'late.mkv', tmp_path/'sound.mkv'):
        half.write_bytes((b := p.read_bytes())[:len(b)//2]); r = detect(half, yes).report; assert r['answer']==CANT and 'its header promises 1.6 s' in r['reason'], (p.name, r['answer'], r['reason'])
    for p in pics[:2]: p.putalpha(100)
    for n,more,count in (('a',{},1), ('b',dict(save_all=True, append_images=pics[1:2]),2)): pics[0].save(tmp_path/f'{n}.avif', **more); assert probe(tmp_path/f'{n}.avif')['streams']==count # the second is a cover and a film, of which the cover is looked at

def test_url(shop):
    "Refused, unless it is asked for; then it comes through a cap, from the web alone, and keeps its secrets"
    class H(BaseHTTPRequestHandler):
        def do_GET(self):
            if '/403' in self.path: return self.send_error(403)
            if '/asks' in self.path and self.headers['Authorization']!='Basic bWU6U0VDUkVU': return self.send_error(401)
            if '/moved' in self.path: self.send_response(302); self.send_header('Location', '/there/a.mp4?key=SECRET'); self.end_headers(); return
            self.send_response(200); self.send_header('Content-Length', str(len(MAN)+1000*('/short' in self.path))); self.end_headers(); self.wfile.write(MAN)
        def log_message(self, *a): pass
    s = HTTPServer(('127.0.0.1', 0), H); threading.Thread(target=s.serve_forever, daemon=True).start(); at = f'127.0.0.1:{s.server_address[1]}'; ask = lambda path, *more: shop(f'http://me:SECRET@{at}{path}?key=SECRET', '--json', 'o.json', *more)
    try:
        c,out,err = ask('/a.mp4'); assert c==2 and '--allow-url' in err and 'SECRET' not in err
        for u in ('file:///etc/hostname','ftp://x/a.mp4','zip://a::b'): c,_,err = shop(u, '--allow-url'); assert c==2 and 'no protocol of the web' in err
        c,out,err = ask('/moved.mp4', '--allow-url'); r = json.loads(Path('o.json').read_text()); assert c in (0,3,4) and r['file']['url']==f'http://{at}/there/a.mp4' and 'there/a.mp4' in out and 'SECRET' not in out+err+json.dumps(r)
        assert ask('/asks.mp4', '--allow-url', '--quiet')[0] in (0,3,4)
        c,_,err = ask('/403.mp4', '--allow-url'); assert c==1 and 'Error 403' in err and 'SECRET' not in err
        c,_,err = ask('/short.mp4', '--allow-url'); assert c==1 and '1000 bytes are missing' in err
        with pytest.raises(DetectError, match='more than 1000 bytes'), D._local(f'http://{at}/a.mp4', Limits(bytes=1000)): pass
    finally: s.shutdown(); s.server_close()

def test_descriptors():
    "Closed standard input and output, and a thousand open files"
    code = 'import os,resource,sys\nfor k in (0,1): os.close(k)\nfrom deepfake_nb.detect import probe\nassert probe(sys.argv[1])["width"]==640\nresource.setrlimit(resource.RLIMIT_NOFILE, (2000, resource.getrlimit(resource.RLIMIT_NOFILE)[1])); x = [os.open("/dev/null", 0) for _ in range(1100)]\nassert max(x)>1023 and probe(sys.argv[1])["width"]==640'
    r = subprocess.run([sys.executable, '-c', code, str(sample('man'))], capture_output=True, text=True); assert r.returncode==0, r.stderr

def test_sigchld_ignored():
    "A parent that ignores SIGCHLD has its children buried at once: a reader that is gone is no error of its own"
    code = 'import os,signal,sys,time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nimport deepfake_nb.detect as D\nL = D.Limits(); fd = D._open(sys.argv[1], "x", L)\nwith D._Reader(fd, "x", L, probe=True) as r:\n r.message(),r.message()\n while os.path.exists(f"/proc/{r.process.pid}"): time.sleep(.01)\nD.READER = "pass"\ntry: D.probe(sys.argv[1])\nexcept D.DetectError as e: print(e)'
    r = subprocess.run([sys.executable, '-c', code, str(sample('man'))], capture_output=True, text=True, timeout=60); assert r.returncode==0 and 'man.mp4: its reader ended early. ' in r.stdout, r.stderr

def test_first_use_without_network(tmp_path):
    code = 'import sys\nfrom deepfake_nb.detect import probe,DetectError\ntry: probe(sys.argv[1])\nexcept DetectError as e: print(e)'
    r = subprocess.run([sys.executable, '-c', code, str(sample('man'))], capture_output=True, text=True, env=os.environ|dict(DEEPFAKE_NB_HOME=str(tmp_path), https_proxy='http://127.0.0.1:9', http_proxy='http://127.0.0.1:9'))
    assert 'man.mp4: the nets that find faces are not here' in r.stdout and not r.stderr, r.stderr

def test_a_taken_reader_takes_nobody_along(asked):
    "It starts no process and signals none; and were it to start one, that one ends with it"
    if not detect(sample('man'), asked, every=9).report['sandbox']['no_children']: pytest.skip('this kernel has no seccomp, and the report says so')
    tries = 'say = []\n for f in (os.fork, lambda: os.kill(os.getppid(), 0), lambda: os.posix_spawn("/bin/true", ["true"], {})):\n  try: f(); say.append("ALLOWED")\n  except OSError as e: say.append(type(e).__name__)\n raise ValueError(say)'
    with pytest.raises(DetectError) as e, mock.patch.object(D, 'READER', tracks(tries)): detect(sample('woman'), asked)
    assert 'ALLOWED' not in str(e.value) and str(e.value).count('PermissionError')==3
    more = """
 import ctypes,fcntl,resource as R
 me,up,say,mine = os.getpid(),os.getppid(),[],[]; f = os.pipe()[0]
 def call(n, *a):
  if d._LIBC.syscall(n, *a)<0: raise OSError(ctypes.get_errno(), '')
 for g in (lambda: R.prlimit(up, R.RLIMIT_NPROC), lambda: os.setpriority(os.PRIO_PROCESS, up, 1), lambda: os.sched_setaffinity(up, [0]), lambda: call(434, up, 0), lambda: call(438, f, 0, 0), lambda: call(425, 0, None),
  lambda: fcntl.fcntl(f, 8, up), lambda: fcntl.fcntl(f, 10, 10), lambda: fcntl.fcntl(f, 15, bytes(8)), lambda: fcntl.ioctl(f, 0x8901, bytes(4))):
  try: g(); say.append('ALLOWED')
  except OSError as e: say.append(e.errno)
 for g in (lambda: R.prlimit(0, R.RLIMIT_NOFILE), lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)), lambda: fcntl.fcntl(f, fcntl.F_GETFL), lambda: fcntl.ioctl(f, 0x541B, bytes(4))): g(); mine.append(1)
 raise ValueError(say, mine)"""
    with pytest.raises(DetectError) as e, mock.patch.object(D, 'READER', tracks(more)): detect(sample('woman'), asked)
    assert str(([1]*10, [1]*4)) in str(e.value), e.value
    with pytest.raises(DetectError) as e, mock.patch.object(D, 'READER', HEAD+'kid = os.fork()\nif not kid: time.sleep(1000)\nd._send(os.fdopen(out, "wb"), "error", reason=str(kid)); time.sleep(1000)'): detect(sample('woman'), asked)
    wait_for(lambda: not (p := Path(f'/proc/{e.value.reason}')).exists() or 'zombie' in (p/'status').read_text(), 10)
    assert D._unlocked(dict(no_files=True, no_network=True, no_children=True))=='' and 'Landlock' in D._unlocked({})

def test_prompt():
    "Help and a wrong path are answered without torch"
    for words in (['--help'],['missing.mp4']):
        code = f'import sys\nfrom deepfake_nb.detect import detect_main\ntry: c = detect_main({words!r})\nexcept SystemExit as e: c = e.code\nassert c in (0,1) and not {{"torch","pandas","matplotlib"}}&set(sys.modules)'
        assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).returncode==0

def test_a_team(tmp_path):
    "Members that look at native pixels, at the face's mask, at sound; who hears nothing is silent, and the fusion goes on"
    from deepfake_nb.checkpoints import save_weights
    from deepfake_nb.export import export_team,load_exported
    from deepfake_nb.fusion import Fusion
    from deepfake_nb.specialists.base import SpecialistConfig
    from deepfake_nb.specialists.team import build_specialist
    torch.manual_seed(0); members = {}
    for c in ('BG','AV','CM'):
        m = build_specialist(SpecialistConfig(c, 'tf_efficientnet_lite0'), 'pack'); save_weights(tmp_path/c, 'stage_4', m, extra=dict(selection='untrained', trained_on=[]))
        card = json.loads((tmp_path/c/'stage_4.json').read_text()); members[c] = dict(folder=str(tmp_path/c), weights='stage_4', sha256=next(iter(card['files'].values()))['sha256'])
    Fusion('mean', dict.fromkeys(members, 1/3), about=dict(members=members)).save(tmp_path/'fusion.json')
    r = np.random.default_rng(0); t = pd.DataFrame(dict(label=[0,1]*40, group=[str(i//2) for i in range(80)], score=r.uniform(0, 1, 80)))
    team = load_exported(export_team(tmp_path/'fusion.json', out=tmp_path/'team', calibration=Calibration(t, 'drawn')))
    assert set(team.extras)=={'native','mask','sound'} and team.length==60
    v = detect(sample('man'), team, every=1.); k = v.report['tracks'][0]
    assert k['members']['AV'] is None and 0<k['members']['BG']<1 and 0<k['members']['CM']<1 and v.report['skipped']['AV abstained']==len(v.moments)
    assert 'Sound, context' in ' '.join(v.report['meaning'])
    w = detect(write_video(tmp_path/'talks.mkv', VideoFile(sample('man')).read(0, 70)[0], sound=np.random.default_rng(0).normal(0, .1, 48000).astype(np.float32)), team).report
    assert w['tracks'][0]['members']['AV'] is not None and 'Context and the origin' in ' '.join(w['meaning'])
    assert abs(k['score']-float(team.fusion(pd.DataFrame([dict(video='x', label=0, group='x')|k['members']])).iloc[0]))<1e-5
