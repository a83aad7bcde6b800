"Detect against hostile files, hostile readers and bad luck: each ends as one error that names the file, promptly, with nothing left running"
import json,os,struct,subprocess,sys,threading,time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler,HTTPServer
from pathlib import Path
from unittest import mock
import numpy as np,pandas as pd,pytest,torch
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
READY,FILM = msg(dict(kind='ready', arrays={}, sandbox={})),msg(dict(kind='film', arrays={}, seconds=9, rate=25, width=64, height=64, codec='x', sound=False, still=False))
SHAPES = dict(frames=['|u1',[4,224,224,3]], landmarks=['<f4',[4,468,2]], boxes=['<f4',[4,4]], transforms=['<f4',[4,2,3]], times=['<f8',[4]], presence=['<f4',[4]])
def clip(number=0, at=0., shapes=SHAPES, times=None, **kw):
    t = np.arange(4)/25+at if times is None else times; body = b''.join((np.asarray(t, d) if k=='times' else np.zeros(s, d)).tobytes() for k,(d,s) in SHAPES.items())
    return msg(dict(kind='clip', arrays=shapes, number=number, start=0)|kw, body)

LIES = dict(noise=b'\0'*100, text=b'HTTP/1.1 200 OK\r\n\r\n', long_head=struct.pack('<4sIQ', b'dfnb', 1<<31, 0), long_body=struct.pack('<4sIQ', b'dfnb', 2, 1<<60)+b'{}', no_json=msg(b'{'), deep=msg(b'['*60_000), a_list=msg([]), unknown=msg(dict(kind='exec', arrays={})), lacking=msg(dict(kind='ready', arrays={})),
    clip_first=READY+clip(), twice=READY+FILM+FILM, nan_size=READY+msg(dict(kind='film', arrays={}, seconds=float('nan'), rate=25, width=64, height=64, codec='x', sound=False, still=False)),
    negative=READY+FILM+clip(shapes=SHAPES|dict(frames=['|u1',[-4,224,224,3]])), objects=READY+FILM+clip(shapes=SHAPES|dict(times=['|O',[4]])), longer=READY+FILM+clip(shapes=SHAPES|dict(frames=['|u1',[400,224,224,3]])), other=READY+FILM+clip(shapes=SHAPES|dict(more=['|u1',[4]])),
    nan=READY+FILM+clip(times=[0,1,np.nan,2]), back=READY+FILM+clip(times=[3,2,1,0]), late=READY+FILM+clip(at=1e6), same=READY+FILM+clip()+clip(), bool_number=READY+FILM+clip(number=True), name=READY+FILM+clip(number='0'),
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
    import PIL.Image
    im = VideoFile(sample('woman')).read(0, 1)[0][0]; one = Exported(None, d1 := Detector(build_stf_mamba(replace(STFConfig.phase_a('demo'), stages=0, mixer='none', ffn='none', dwt=False, hll_gate=False, hll_loss='none'), 'pack'), 'images', 'STFMamba', 1), {'A':d1}, None, asked.calibration, {}, dict(name='A'))
    boxes = {}
    for k,(fmt,turn) in dict(jpeg=(1,0), png=(1,0), webp=(1,0), turned=(6,1)).items():
        x = PIL.Image.Exif(); x[274] = fmt; p = tmp_path/f'{k}.{"jpg" if k in ("jpeg","turned") else k}'; PIL.Image.fromarray(np.rot90(im, turn)).save(p, exif=x.tobytes(), **dict(lossless=True) if k=='webp' else dict(quality=95) if k in ('jpeg','turned') else {})
        v,w = detect(p, one).report,detect(p, asked).report; boxes[k] = v['tracks'][0]['timeline'][0]['box']
        assert v['score'] is not None and v['tracks'][0]['clips']==1 and v['video']['still'] and v['video']['qp'] is None
        assert w['answer']==CANT and 'consecutive frames' in w['reason'] and 'single picture' in w['reason']
    assert np.ptp(list(boxes.values()), 0).max()<.02

def test_main(tmp_path, asked, capsys, monkeypatch):
    "A folder: each file a verdict, errors counted, others left; the exit code of the worst"
    import deepfake_nb.export as X
    monkeypatch.setattr(X, 'load_exported', lambda folder, device='cpu': asked); (tmp_path/'m').mkdir(); f = tmp_path/'films'; f.mkdir(); (f/'a.mp4').write_bytes(sample('man').read_bytes()); (f/'b.mp4').write_bytes(b'no film'); (f/'c.txt').write_text('x')
    code = detect_main([str(f), '--model', str(tmp_path/'m'), '--json', str(tmp_path/'out.json')]); out = capsys.readouterr(); got = json.loads((tmp_path/'out.json').read_text())
    assert code in (1,3) and [g['answer'] for g in got][1] is None and got[0]['format']=='deepfake_nb verdict 1' and 'of another kind' in out.out and 'could not be read' in out.out and 'b.mp4: ' in out.err and 'Traceback' not in out.err
    assert detect_main([str(f/'a.mp4'), '--model', str(tmp_path/'m'), '--json', '-', '--quiet']) in (0,3,4); assert json.loads(capsys.readouterr().out)['file']['name']=='a.mp4'
    monkeypatch.setenv('DEEPFAKE_NB_HOME', str(tmp_path/'nowhere'))
    monkeypatch.undo(); assert D._code(['real','real'])==0 and D._code([CANT,'real'])==4 and D._code(['could not be read',CANT])==1 and D._code(['fake','could not be read',CANT])==3

def test_url(tmp_path, asked, capsys, monkeypatch):
    "Refused, unless it is asked for; then it comes through a cap"
    import deepfake_nb.export as X
    data = sample('man').read_bytes()
    class H(BaseHTTPRequestHandler):
        def do_HEAD(self): self.send_response(200); self.send_header('Content-Length', str(len(data))); self.end_headers()
        def do_GET(self): self.do_HEAD(); self.wfile.write(data)
        def log_message(self, *a): pass
    s = HTTPServer(('127.0.0.1', 0), H); threading.Thread(target=s.serve_forever, daemon=True).start(); url = f'http://127.0.0.1:{s.server_address[1]}/a.mp4'
    try:
        assert detect_main([url])==2 and '--allow-url' in capsys.readouterr().err
        monkeypatch.setattr(X, 'load_exported', lambda folder, device='cpu': asked); (tmp_path/'m').mkdir()
        assert detect_main([url, '--allow-url', '--model', str(tmp_path/'m')]) in (0,3,4) and 'a.mp4' in capsys.readouterr().out
        with pytest.raises(DetectError, match='more than 1000 bytes'), D._local(url, Limits(bytes=1000)): pass
    finally: s.shutdown(); s.server_close()

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
    assert abs(k['score']-float(team.fusion(pd.DataFrame([dict(video='x', label=0, group='x')|k['members']])).iloc[0]))<1e-5
