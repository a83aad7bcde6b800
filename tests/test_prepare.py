"From a published layout to a store and a training: every miniature, the `prepare` stage as papermill runs it, a kill in the middle, and Phase A on a publisher's split"
import os,subprocess,sys,time
from pathlib import Path
from dataclasses import replace
import psutil,pytest
from deepfake_nb.clips import FaceStore
from deepfake_nb.datasets import read_dataset
from deepfake_nb.miniatures import MINIATURES,miniature
from deepfake_nb.executors import notebook
from deepfake_nb.presets import people,prepared
from deepfake_nb.runs import run_stage
from deepfake_nb.stores import build_store,coverage_table
from test_stages import last,room
from test_store import ENV

@pytest.mark.parametrize('layout', sorted(set(MINIATURES)-{'deepfakebench'}))
def test_every_layout_becomes_a_store(layout, tmp_path):
    m = read_dataset(miniature(layout, tmp_path))
    report = build_store(m, tmp_path/'store', size=48, spans=1, span=12)
    t = coverage_table(report, m)
    assert t.videos.sum()==len(m)==len(report.rows) and not report.errors
    assert t['coverage %'].min()>(50 if layout=='wilddeepfake' else 90) # one of its sequences has a hole in its numbers, and pieces of less than eight frames are no track
    assert all(r.size[0]>=90 for r in report.rows)
    store = report.store()
    assert {x.video for x in store.tracks}=={r.key for r in report.rows if r.tracks} and {x.label for x in store.tracks}=={v.label for v in m}
    # a fake whose original is there is cut like it, to the pixel, or its row says why not
    rows = {r.key:r for r in report.rows}
    for v in m:
        if v.original in rows and rows[v.key].boxes=='original': a,b = (store.arrays(k+'#0')['transforms'] for k in (v.key, v.original)); assert (a==b[-len(a):]).all()
        elif v.original: assert rows[v.key].boxes in ('the original is not there','too little of the original is left behind the silence')
    if layout in ('faceforensics','dfdc','fakeavceleb'): assert sum(r.boxes=='original' for r in report.rows)>.5*sum(v.label for v in m)
    assert report.sums.keys()==rows.keys() and len(set(report.sums.values()))==len(m)

def test_deepfakebench_frames_become_a_store(tmp_path):
    root = miniature('deepfakebench', tmp_path)
    def stored(name): m = read_dataset(next(root.rglob(name))); return m,build_store(m, tmp_path/name[:-5], size=48)
    m,report = stored('DFDCP.json')
    assert {v.kind for v in m}=={'frames'} and not report.errors and all(r.tracks for r in report.rows)
    assert not any(t.sound or t.native for t in report.store().tracks)
    # seven pictures are fewer than a track has: rows without a face, none lost
    m,report = stored('FF-DF.json'); assert len(report.rows)==len(m) and not report.errors and {(r.frames, r.tracks) for r in report.rows}=={(7, 0)}

def prepare(root, runs, **given): return run_stage(notebook('prepare'), dict(preset='tiny', videos=str(root))|given, runs=runs)

def test_prepare_and_phase_a_on_a_publishers_split(room):
    "Real films of FaceForensics++ alone, the official lists as they are: trained on train, chosen on val"
    root = miniature('faceforensics', room/'ff')
    given = dict(labels='real', compression='c23', spans=1, span=16)
    rec = prepare(root, room/'ff runs', **given, workers=2) # the miniature's ten people are cut from three films, and the audit sees through them
    assert rec.state=='failed' and 'show the same pictures' in rec['reason']
    rec = prepare(root, room/'ff runs', **given, allow='pictures', workers=2).check()
    p = last(rec); manifest,sums = prepared(FaceStore(p['store']))
    assert p['unreadable']==0 and p['leaks_allowed']>0 and p['reused']==p['videos'] and p['faces_compared']==p['videos']==len(manifest)==len(sums) and p['manifest_hash']==manifest.hash
    split = people(FaceStore(p['store']))
    assert 'split as the manifest says' in split.rule and p['rule']==split.rule
    train = run_stage(notebook('phase_a'), dict(preset='tiny', videos=str(root), store=p['store'], steps=2, length=4), runs=room/'ff runs').check()
    assert last(train)['selection']==split.rule and 'checkpoints are chosen on' in split.rule

def test_prepare_refuses_a_leak_and_names_it(room):
    "An original of the training list and one of the test list are cut from one YouTube film"
    rec = prepare(miniature('faceforensics', room/'leak', leak=True), room/'leak runs', labels='real', spans=1, span=12, store=str(room/'none'))
    assert rec.state=='failed' and 'LeakError' in rec['reason'] and '078' in rec['reason'] and '954' in rec['reason'], rec['reason']
    assert not (room/'none').exists() # before anything was decoded

def test_prepare_reads_a_zip_in_place_and_is_resumed_after_a_kill(room):
    "kill -9 of the whole stage in the middle; what was done is not done again, and the store is that of an undisturbed run"
    root = miniature('dfdc', room/'dfdc', parts=1, frames=46); chunk, = root.glob('*.zip')
    given = dict(layout='dfdc')
    whole = last(prepare(chunk, room/'dfdc runs', **given, store=str(room/'whole')).check())
    torn = room/'torn'
    code = f"from deepfake_nb.executors import notebook; from deepfake_nb.runs import run_stage; run_stage(notebook('prepare'), dict(preset='tiny', videos={str(chunk)!r}, store={str(torn)!r}, **{given!r}), runs={str(room/'torn runs')!r})"
    child = subprocess.Popen([sys.executable, '-c', code], env=os.environ|ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (torn.exists() and len(list(torn.glob('[!.]*.zip')))>=2) and child.poll() is None: time.sleep(.02)
    family = psutil.Process(child.pid).children(recursive=True)+[psutil.Process(child.pid)] # the kernel has a session of its own
    for f in family: f.kill()
    psutil.wait_procs(family)
    before = {p.name:p.stat().st_mtime_ns for p in torn.glob('[!.]*.zip')}; assert not (torn/'manifest.jsonl').exists() and 2<=len(before)<whole['videos']
    again = last(prepare(chunk, room/'dfdc runs', **given, store=str(torn)).check())
    assert again['reused']>=len(before) and again['data_hash']==whole['data_hash']
    a,b = ({p.name:p.read_bytes() for p in Path(d).glob('[!.]*.zip')} for d in (whole['store'], torn))
    assert a==b and all((torn/n).stat().st_mtime_ns==t for n,t in before.items())

def test_forked_workers_open_the_zip_themselves(tmp_path):
    "A zip that the parent has open, and four children that read it at once: an inherited handle would give them each other's bytes"
    import hashlib,zipfile
    from deepfake_nb.sources import open_member
    data = {f'{i}.bin':os.urandom(1<<20) for i in range(8)}
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as z:
        for n,d in data.items(): z.writestr(n, d)
    def read(n):
        with open_member(tmp_path/'z.zip', n) as (f,digest): return digest==hashlib.sha256(data[n]).hexdigest()
    assert read('0.bin')
    pids = []
    for _ in range(4):
        if not (pid := os.fork()):
            ok = False
            try: ok = all(read(n) for _ in range(6) for n in data)
            finally: os._exit(0 if ok else 3)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]==[0]*4

def test_two_prepared_sets_are_compared_by_bytes_and_pictures(tmp_path, capsys):
    "One recording, twice encoded and called differently, in what is trained on and in what is judged: only the pictures tell"
    from deepfake_nb.leakage import main
    from deepfake_nb.manifest import Manifest,pack_manifest
    def stored(place, *names):
        m = Manifest(replace(v, name=f'{place} {v.name}', group=f'{place} {v.name}') for v in pack_manifest(names))
        build_store(m, tmp_path/place, size=112, spans=2, span=24); return str(m.save(tmp_path/place/'manifest.jsonl'))
    a,b,c = stored('a', 'man'),stored('b', 'cartoon_then_man','carphone'),stored('c', 'man','woman')
    assert main([a, b])==0==main([a, c])
    assert main([a, b, '--stores'])==1 and 'show the same pictures' in capsys.readouterr().out
    assert main([a, c, '--stores'])==1 and 'are the same file' in capsys.readouterr().out
    assert main([a, b, '--stores', '--allow', 'pictures'])==0
    (tmp_path/'d').mkdir(); assert main([str(Manifest.load(a).save(tmp_path/'d'/'m.jsonl')), '--stores'])==2
