"The monitor over real writers: 24 processes that train, die, lie about the time and tear their lines; shares that vanish; addresses; a terminal. SOAK=N for the long count."
import errno,json,math,os,random,re,resource,shutil,signal,subprocess,sys,tempfile,threading,time,tracemalloc
from datetime import datetime,timezone
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler,ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs,unquote,urlparse
from xml.sax.saxutils import escape
import psutil,pytest
from common import count,ended,fork,told,wait_for
from test_progress import Terminal
from deepfake_nb.budget import Ledger
from deepfake_nb.journal import Journal
from deepfake_nb import monitor
from deepfake_nb.monitor import Events,Monitor,MonitorError,Rules,alarms,monitor_main,monitor_page,overview,page,read_events
from deepfake_nb.pack import write_json
from deepfake_nb.runs import machine_id

ROOT = Path(__file__).resolve().parent.parent
TEAM = {1:SimpleNamespace(models=('BG','AV')), 2:SimpleNamespace(models=('CM','RR')), 3:SimpleNamespace(models=('LL','TM'))}
AGES = ('beat_age','step_age','life_age','checkpoint_age','allowed')

# ---- 24 writers

class Writer:
    "One run that writes as a training does, in a process of its own, and says in a file of its own what it did"
    def __init__(self, root, i, kind, where, code, stage=1, skew=0., steps=60):
        self.root,self.i,self.kind,self.code,self.stage,self.skew,self.steps = root,i,kind,code,stage,skew,steps
        self.folder,self.truth,self.before = root/'share'/where,root/f'truth{i}',0
    def record(self, status, reason=''):
        me = psutil.Process()
        write_json(self.folder/'run.json', dict(run=self.folder.name, stage='specialist_stage', status=status, reason=reason, parameters=dict(specialist=self.code, stage=self.stage, seed=0), host=machine_id(),
            pid=me.pid, pid_started=me.create_time(), started=f'2026-11-28T10:{self.i:02}:00+00:00', metrics=None, cost=None, price=.39))
    def note(self, **what):
        "What was really done; whole lines, before the next step begins"
        with open(self.truth, 'ab', buffering=0) as f: f.write((json.dumps(what)+'\n').encode())
    def step(self, n, **row):
        loss = .1+.6*math.exp(-n/40)+.05*random.random()
        self.j.log(step=n, **dict(loss=loss)|row)
        if n%15==0 and self.kind!='collapse': auc = .5+.4*(1-math.exp(-n/50)); self.j.log(step=n, evaluation=dict(auc=auc, real=auc-.05, fake=auc-.08, videos=40, alarm=''))
        self.j.beat(step=n, steps=self.steps, loss=row.get('loss', loss), checkpoint=0, dollars=2.5, spent=.01*n, left=2.5-.01*n, speed=50.); self.note(step=n, rows=self.before+len(self.j.rows))
    def hold(self, beat=True, more=True):
        "Go on until killed"
        n = self.steps
        while True:
            time.sleep(.1); n += more
            if more: self.step(n)
            elif beat: self.j.beat(step=n, alive=time.time())
    def __call__(self):
        if self.kind=='waiting': self.record('running'); self.note(step=None, rows=0); time.sleep(600)
        self.j = Journal(self.folder, every=0., clock=lambda: time.time()+self.skew)
        if self.kind!='bare': self.record('running')
        self.j.log(step=0, evaluation=dict(auc=.5, real=.5, fake=.5, videos=40))
        for n in range(1, self.steps+1):
            time.sleep(random.random()*.01); self.step(n, **dict(loss=math.nan) if self.kind=='nan' and n>50 else {})
        return getattr(self, self.kind)()
    def finish(self, state, status='succeeded', reason='', **kw): self.j.beat(state, step=self.steps, **kw); self.record(status, reason); self.note(step=self.steps, rows=self.before+len(self.j.rows)); return 0
    def done(self): return self.finish('done')
    def budget(self): return self.finish('budget')
    def stopped(self): return self.finish('signal', 'interrupted', 'SIGTERM to the runner')
    def failed(self): return self.finish('failed', 'failed', 'code cell 13 of 16: RuntimeError: out of memory', error='RuntimeError: out of memory')
    def killed(self): self.hold()
    def torn(self):
        with open(self.folder/'metrics.jsonl', 'ab', buffering=0) as f: f.write(b'{"time": 12.5, "step": 99, "lo')
        os.kill(os.getpid(), signal.SIGKILL)
    def running(self): self.hold()
    def bare(self): self.hold()
    def nan(self): self.hold()
    def collapse(self): self.j.log(step=self.steps, evaluation=dict(auc=.5, real=.01, fake=1., videos=80, alarm='says fake to 99 % of 40 reals (95 % interval 87 to 100 %)')); self.hold()
    def stuck(self): self.hold(more=False)
    def silent(self): self.hold(beat=False, more=False)
    def broken(self):
        with open(self.folder/'metrics.jsonl', 'ab', buffering=0) as f: f.write(b'{"time": 1.0, "step"\n\xff\xfe\n[1, 2]\n')
        self.hold()
    def resumed(self):
        self.j.close(); self.before = len(self.j.rows)
        with open(self.folder/'metrics.jsonl', 'ab') as f: f.write(b'{"time": 1')
        self.j = Journal(self.folder, every=0., clock=lambda: time.time()+self.skew); assert self.j.torn==10
        for n in range(40, self.steps+1): self.step(n)
        self.hold()

def crowd(root):
    w,n = [],0
    def add(kind, where, code, **kw): w.append(Writer(root, len(w), kind, where, code, **kw))
    for i,c in enumerate(('BG','AV','CM','RR','LL','TM')): add('done', f'runs/20261128T1000{i:02}Z-specialist_stage-0000000-{i:06x}', c)
    for c in ('BG','CM'): add('budget', f'ann/runs/b{c}', c, stage=2)
    for c in ('BG','CM','LL'): add('killed', f'ann/runs/k{c}', c, stage=3)
    add('torn', 'ben/runs/torn', 'TM', stage=3)
    for s,c in ((-5*3600., 'AV'), (5*3600., 'RR')): add('running', f'ben/runs/skew{c}', c, stage=2, skew=s)
    add('nan', 'person 3/runs/nan', 'LL', stage=2); add('collapse', 'person 3/runs/collapse', 'TM', stage=2); add('stuck', 'person_1/runs/stuck', 'AV', stage=3); add('silent', 'person_1/runs/silent', 'AV', stage=4)
    add('stopped', 'dan/runs/stopped', 'RR', stage=3); add('failed', 'dan/runs/failed', 'RR', stage=4); add('broken', 'dan/runs/broken', 'CM', stage=4); add('resumed', 'eve/runs/resumed', 'BG', stage=4); add('waiting', 'eve/runs/waiting', 'LL', stage=4)
    add('nan', 'eve/runs/too', 'LL', stage=2)
    return w

STATE = dict(done='done', budget='budget', killed='crashed', torn='crashed', running='running', nan='running', collapse='running', stuck='stale', silent='stale', stopped='stopped', failed='crashed', broken='running', resumed='running', waiting='waiting')
RINGS = dict(killed={'crashed'}, torn={'crashed'}, failed={'crashed'}, nan={'nan','twice'}, collapse={'collapse'}, stuck={'stuck'}, silent={'silent'})

def truth(w): return json.loads(w.truth.read_bytes().split(b'\n')[-2])

@pytest.fixture(scope='module')
def share(tmp_path_factory):
    "The share after an hour: who shall die has died, who shall live writes on"
    root = tmp_path_factory.mktemp('monitor'); ws = crowd(root); assert len(ws)==24
    pids,jump = {w.i:fork(w) for w in ws},[0.]
    m = Monitor(root/'share', team=TEAM, steady=lambda: time.monotonic()+jump[0])
    try:
        wait_for(lambda: all(w.truth.exists() and (w.kind=='waiting' or truth(w)['step']>=w.steps) for w in ws) and m.look()['counts'], 120) # looks while they write
        for w in ws:
            if w.kind=='killed': os.kill(pids[w.i], signal.SIGKILL); ended(pids.pop(w.i))
            elif w.kind in ('done','budget','stopped','failed','torn'): assert ended(pids.pop(w.i))==(-9 if w.kind=='torn' else 0)
        os.kill(pids[next(w.i for w in ws if w.kind=='silent')], signal.SIGSTOP)
        m.look(); jump[0] += 1000.; time.sleep(1.5) # for the reader more than a quarter of an hour goes by; who lives writes meanwhile
        yield SimpleNamespace(root=root, ws=ws, m=m, pids=pids, s=m.look(), truths={w.i:truth(w) for w in ws})
    finally:
        for p in pids.values(): os.kill(p, signal.SIGKILL); ended(p)

def test_the_reader_says_what_the_writers_say(share):
    by = {r['run']:r for r in share.s['runs']}; assert len(by)==24
    for w in share.ws:
        r,t = by[w.folder.relative_to(share.root/'share').as_posix()],share.truths[w.i]
        assert r['state']==STATE[w.kind], (w.kind, r['state'], r['why'])
        assert (r['model'], r['stage'])==(w.code, f'stage {w.stage}')
        if r['state'] in ('running',): assert t['step']-3<=r['step']<=t['step']+1 # the truth was read after the look, and is a few steps ahead; or its writer is slow, and has not told of its last step yet
        else: assert r['step'] in (t['step'], *([t['step']+1] if w.kind=='killed' else ())), w.kind
        if w.kind!='waiting': assert abs(r['rows']-t['rows'])<=3 and (r['nan']>0)==(w.kind=='nan')
        assert r['broken']==(3 if w.kind=='broken' else 0) and (r['torn']>0)==(w.kind=='torn') and not r['unreadable'] and not r['anew']
        if w.skew: assert r['beat_age']<60 and r['checkpoint_age']<600
    people = {r['run']:r['person'] for r in by.values()}
    assert people['runs/20261128T100002Z-specialist_stage-0000000-000002']=='person 2' and people['person 3/runs/nan']=='person 3' and people['eve/runs/too']=='eve'
    assert by['eve/runs/resumed']['loss_curve'][0]==sorted(by['eve/runs/resumed']['loss_curve'][0])

def test_exactly_the_right_alarms(share):
    rung = {}
    for a in share.s['alarms']:
        if a['kind']!='disk': rung.setdefault(a['run'], set()).add(a['kind']); assert a['words'] and a['remedy']
    for w in share.ws:
        run = w.folder.relative_to(share.root/'share').as_posix(); want = RINGS.get(w.kind, set())-({'twice'} if run=='person 3/runs/nan' else set())
        assert rung.get(run, set()) in (want, want|{'twice'}, want-{'twice'}), (run, rung.get(run))
    assert sum('twice' in k for k in rung.values())==1

def test_it_is_well_again(share):
    "The process that was stopped goes on: no alarm of silence any more"
    w = next(w for w in share.ws if w.kind=='nan'); assert share.m.look()['counts']==share.s['counts']
    s = share.s; text = page(s, 5); assert len(overview(s, 120))>24 and text.count('<tr>')>24 and len(text)<400_000
    assert w.kind in {a['kind'] for a in s['alarms']}

def test_terminal_redraws_and_ends_with_ctrl_c(share):
    term = Terminal('import sys; from deepfake_nb.monitor import monitor_main; sys.exit(monitor_main(sys.argv[1:]))', share.root/'share', '--every', '.2', cols=130, rows=60)
    try:
        got = term.read(lambda s: term.all.count('\x1b[J')>=3); assert 'crashed' in got[0] and any(l.startswith('ALARM nan') for l in got) and len(got)<60
        for _ in range(4): # Python loses a key that falls into a finaliser: then one presses again
            os.write(term.master, b'\x03')
            try: term.p.wait(10); break
            except subprocess.TimeoutExpired: continue
        assert term.p.wait(30)==0
    finally: term.close()

# ---- the same snapshot, whatever the increments

def random_file(rng):
    "What a hard life leaves: chunks, resumes, NaN, torn and broken lines"
    lines,step = [],0
    for _ in range(rng.randint(1, 400)):
        step = 0 if rng.random()<.01 else max(2, step-rng.randint(1, 30)) if rng.random()<.02 else step+1
        row = dict(time=1e9+len(lines)+rng.random(), step=step, loss='nan' if rng.random()<.02 else round(rng.random(), 6), lr=1e-4)
        if rng.random()<.05: row = dict(time=row['time'], step=step, evaluation=dict(auc=rng.random(), real=rng.random(), fake=rng.random(), videos=rng.randint(2, 90)))
        if rng.random()<.03: row['chunk'] = f'{rng.randint(0, 9):02}'
        line = json.dumps(row).encode(); lines.append(line[:rng.randint(0, len(line)-1)] if rng.random()<.03 else line)
    return b'\n'.join(lines)+(b'\n' if rng.random()<.7 else b'')

def rows_of(s): return [{k:v for k,v in r.items() if k not in AGES} for r in s['runs']]

def test_random_increments_give_the_same_snapshot(tmp_path):
    good,n = 0,count(25)
    for seed in range(n):
        rng = random.Random(seed); root = tmp_path/f'{seed}'; datas = {f'p/runs/r{i}':random_file(rng) for i in range(rng.randint(1, 3))}
        little,at = Monitor(root, team=TEAM, steady=lambda: 0.),dict.fromkeys(datas, 0)
        for f in datas: (root/f).mkdir(parents=True); (root/f/'metrics.jsonl').touch()
        while any(at[f]<len(d) for f,d in datas.items()):
            for f,d in datas.items():
                k = rng.choice([0, 1, rng.randint(1, 300), 10_000])
                with open(root/f/'metrics.jsonl', 'ab') as o: o.write(d[at[f]:at[f]+k])
                at[f] = min(len(d), at[f]+k)
                whole = json.dumps(dict(state='running', step=at[f])).encode(); (root/f/'status.json').write_bytes(whole[:rng.randint(0, len(whole))]) # half written, in place
            little.look()
        for f in datas: (root/f/'status.json').write_text('{"state": "running", "step": 7, "checkpoint": 3}')
        once = Monitor(root, team=TEAM, steady=lambda: 0.)
        good += rows_of(little.look())==rows_of(once.look())
    told(good, n, 'increments and one reading agree', 0)

def test_a_file_that_was_replaced(tmp_path):
    f = tmp_path/'CM/host/metrics.jsonl'; f.parent.mkdir(parents=True); put = lambda *steps: ''.join(json.dumps(dict(time=1e9+s, step=s, loss=.5+.001*s))+'\n' for s in steps)
    m = Monitor(tmp_path, team=TEAM); now = lambda: (r := m.look()['runs'][0], (r['rows'], r['step'], r['anew']))[1]
    f.write_text(put(*range(1, 21))); assert now()==(20, 20, 0)
    f.write_text(put(*range(1, 6))); assert now()==(5, 5, 1) # shorter
    f.write_text(put(*range(101, 161))); assert now()==(60, 160, 2) # longer, the same inode
    other = f.with_name('new'); other.write_text(put(*range(101, 161))+put(161)); os.replace(other, f); assert now()==(61, 161, 3) # another inode, the same beginning
    f.unlink(); assert m.look()['runs']==[]; f.write_text(put(1)); assert now()==(1, 1, 0)

def test_listing_while_everything_moves(tmp_path):
    "Status files are replaced all the time and whole runs vanish: a look never fails and never misses who is there"
    def busy():
        js = [Journal(tmp_path/f'p/runs/r{i}', every=0.) for i in range(6)]
        for n in range(10**9):
            for j in js: j.beat(step=n)
            shutil.rmtree(tmp_path/'p/runs/ghost', ignore_errors=True); g = Journal(tmp_path/'p/runs/ghost', every=0.); g.log(step=n); g.beat(step=n); g.close()
    pid = fork(busy)
    try:
        wait_for(lambda: (tmp_path/'p/runs/r5/status.json').exists()); m = Monitor(tmp_path, team=TEAM)
        for _ in range(count(150)):
            s = m.look(); assert {f'p/runs/r{i}' for i in range(6)}<={r['run'] for r in s['runs']} and not s['listing']['error'] and not any(r['unreadable'] for r in s['runs'])
        last = m.look()['runs'][0]['step']; wait_for(lambda: m.look()['runs'][0]['step']>last)
    finally: os.kill(pid, signal.SIGKILL); ended(pid)

def test_a_share_that_is_away_for_a_while(tmp_path):
    t,share = [0.],tmp_path/'share'; j = Journal(share/'CM/host'); j.log(step=1, loss=.5); j.beat(step=1); j.close()
    m = Monitor(share, team=TEAM, steady=lambda: t[0]); before = rows_of(m.look())
    os.rename(share, tmp_path/'away'); t[0] = 200.; s = m.look()
    assert rows_of(s)==before and s['listing']['age']==200. and 'FileNotFoundError' in s['listing']['error'] and 'last listed 0:04 ago' in overview(s)[0] and 'last listed' in page(s)
    os.rename(tmp_path/'away', share); s = m.look(); assert s['listing']==dict(age=0., error='', unseen=[])
    with pytest.raises(MonitorError, match='Remedy'): Monitor(tmp_path/'none').look()

# ---- lives, nights, records that were left open

def run(folder, state='running', clock=time.time, rec=None, **kw):
    "A run of one step"
    j = Journal(folder, every=0., clock=clock); j.log(step=1, loss=.5); j.beat(state, step=1, **kw); j.close()
    if rec is not None: write_json(folder/'run.json', dict(stage='phase_a', status='running', parameters={}, host=machine_id(), pid=2**22-7, pid_started=1.)|rec)
    return folder

def old(folder, s=86_400):
    for p in folder.iterdir(): os.utime(p, (time.time()-s,)*2)

def rung(s): return [(a['kind'], a['run']) for a in s['alarms'] if a['kind']!='disk']

@pytest.mark.parametrize('state', ['done','budget','signal'])
def test_killed_after_its_training(tmp_path, state):
    "The training ended, the notebook had more to do and was killed: that is no good end"
    d = run(tmp_path/'ann/runs/x', state, rec={}); m = Monitor(tmp_path, team=TEAM); assert m.look()['runs'][0]['state']!='crashed' # a moment ago: it may still be at it
    old(d); s = Monitor(tmp_path, team=TEAM).look(); assert rung(s)==[('crashed', 'ann/runs/x')] and f'had ended ({state})' in s['runs'][0]['why']

@pytest.mark.parametrize('state', ['done','budget','signal'])
def test_a_notebook_at_work_after_its_training(tmp_path, state):
    "Silent for a day, on a machine that nobody can ask or here and seen to live: words and no alarm"
    me = psutil.Process(); d = run(tmp_path/'ann/runs/x', state)
    for rec,words in ((dict(host='another'), 'its notebook not: silent for 24:0'),(dict(host=machine_id(), pid=me.pid, pid_started=me.create_time()), '')):
        write_json(d/'run.json', dict(stage='phase_a', status='running', parameters={})|rec); old(d); s = Monitor(tmp_path, team=TEAM).look()
        assert s['counts']=={monitor.SAID[state]:1} and rung(s)==[] and words in s['runs'][0]['why'] and bool(words)==bool(s['runs'][0]['why'])

@pytest.mark.parametrize('pid', [2**22-7, -5, 0, 1.5, 2**31-1])
def test_another_machine_of_our_name(tmp_path, pid):
    "A pid that is not here says nothing while the run beats"
    d = run(tmp_path/'ann/runs/x', rec=dict(pid=pid)); assert Monitor(tmp_path, team=TEAM).look()['counts']==dict(running=1)
    old(d, 400); assert Monitor(tmp_path, team=TEAM).look()['counts']==({'crashed':1} if pid>=1 else {'stale':1})

def test_a_long_evaluation_is_no_crash(tmp_path):
    "An hour and ten minutes without a word: a habit, by its rows; and the first of them where its process is seen to live"
    d,me,now = tmp_path/'ann/runs/x',psutil.Process(),time.time()
    def epochs(k):
        shutil.rmtree(d, ignore_errors=True); clock = [now-k*4400]; j = Journal(d, every=0., clock=lambda: clock[0])
        for e in range(k):
            for i in range(20): clock[0] += 10; j.log(step=20*e+i+1, loss=.5)
            if e<k-1: clock[0] += 4200; j.log(step=20*e+20, evaluation=dict(auc=.9))
        j.beat(step=20*k, steps=99); j.close()
    def look(s, **rec): write_json(d/'run.json', dict(stage='phase_a', status='running', parameters={}, host='another')|rec); old(d, s); return Monitor(tmp_path, team=TEAM).look()
    epochs(4); assert look(4150)['counts']==dict(running=1) and rung(look(4150))==[] and rung(look(7300))==[('crashed', 'ann/runs/x')]
    epochs(1); assert look(4150)['counts']==dict(crashed=1) and look(4150, host=machine_id(), pid=me.pid, pid_started=me.create_time())['counts']==dict(stale=1)

def test_two_nights_are_no_habit(tmp_path):
    clock,t = [1e9],[0.]; j = Journal(tmp_path/'ann/runs/x', every=0., clock=lambda: clock[0])
    for life in range(3):
        for n in range(1+10*life, 11+10*life): clock[0] += 1; j.log(step=n, loss=.5); j.beat(step=n, steps=100, checkpoint=10*life)
        clock[0] += 10*3600
    j.close(); m = Monitor(tmp_path, team=TEAM, steady=lambda: t[0]); assert m.look()['runs'][0]['allowed']==300.
    t[0] = 1200.; assert rung(m.look())==[('silent', 'ann/runs/x')]

@pytest.mark.parametrize('away', [24*3600, -5*3600, 1800])
def test_the_work_that_a_crash_would_cost(tmp_path, away):
    "Resumed at its checkpoint: the night, or a clock that is behind, is no work; three hours and a half later it is due"
    clock = [1e9]; j = Journal(tmp_path/'ann/runs/x', every=0., clock=lambda: clock[0])
    def go(steps, dt=1.):
        for n in steps: clock[0] += dt; j.log(step=n, loss=.5); j.beat(step=n, steps=900, checkpoint=8)
    go(range(1, 11)); clock[0] += away; go(range(9, 12)); r = Monitor(tmp_path, team=TEAM).look()['runs'][0]; assert 2<=r['checkpoint_age']<10
    go(range(12, 77), 200.); s = Monitor(tmp_path, team=TEAM).look(); assert rung(s)==[('checkpoint', 'ann/runs/x')] and abs(s['runs'][0]['checkpoint_age']-13_002)<100; j.close()

def test_a_crash_is_forgiven_by_one_clock(tmp_path):
    "Not by an older run of a machine whose clock is ahead, nor by a colleague's; by a later one of the same person"
    ok,bad = dict(status='succeeded'),dict(status='failed', reason='oom'); run(tmp_path/'ann/runs/old', 'done', rec=ok|dict(host='ahead', started='2026-11-28T20:00:00+00:00')); old(tmp_path/'ann/runs/old', 500)
    run(tmp_path/'ann/runs/new', 'failed', rec=bad|dict(host='right', started='2026-11-28T12:00:00+00:00')); old(tmp_path/'ann/runs/new', 400); run(tmp_path/'ben/runs/his', 'done', rec=ok|dict(host='b', started='2026-11-28T21:00:00+00:00'))
    look = lambda: rung(Monitor(tmp_path, team=TEAM).look()); assert look()==[('crashed', 'ann/runs/new')]
    run(tmp_path/'ann/runs/again', rec=dict(host='behind', started='2026-11-28T05:00:00+00:00')); assert look()==[]

def test_who_was_alive_does_not_vanish(tmp_path):
    for n in ('x','y'): run(tmp_path/f'ann/runs/{n}', 'running' if n=='x' else 'done')
    m = Monitor(tmp_path, team=TEAM); m.look(); os.rename(tmp_path/'ann', tmp_path/'.away')
    for _ in range(2): s = m.look(); assert rung(s)==[('crashed', 'ann/runs/x')] and s['runs'][0]['why']=='its folder is gone' and len(s['runs'])==1
    os.rename(tmp_path/'.away', tmp_path/'ann'); s = m.look(); assert s['counts']==dict(running=1, done=1) and rung(s)==[]

def test_who_moved_to_an_archive_is_no_crash(tmp_path):
    "Moved, by its record: no word. Moved out of sight: an hour of words; so is one that left no record"
    t,rec = [0.],dict(host='h', pid=7, pid_started=1., started='2026-11-28T10:00:00+00:00')
    a,b,c = (run(tmp_path/f'ann/runs/{k}', rec=k!='c' and rec|dict(pid=ord(k)) or None) for k in 'abc'); m = Monitor(tmp_path, team=TEAM, steady=lambda: t[0]); assert len(m.look()['runs'])==3
    write_json(a/'run.json', dict(stage='phase_a', status='interrupted', parameters={}, **rec|dict(pid=ord('a')))); (tmp_path/'archive').mkdir()
    for d,to in ((a, tmp_path/'archive/a'),(b, tmp_path/'.b'),(c, tmp_path/'archive/c')): os.rename(d, to)
    t[0] = 3500.; s = m.look(); assert rung(s)==[('crashed', 'ann/runs/b'),('crashed', 'ann/runs/c')] and s['counts'].get('stopped')==1
    t[0] = 7000.; assert [x for x in rung(m.look()) if 'ann' in x[1]]==[('crashed', 'ann/runs/b'),('crashed', 'ann/runs/c')] # since it was missed, not since its last word
    for t[0] in (7200.,7205.): assert {r['run'] for r in m.look()['runs']}=={'archive/a','archive/c'}

@pytest.mark.parametrize('call', ['scandir','stat'])
def test_a_stale_handle_is_no_empty_folder(tmp_path, monkeypatch, call):
    "ESTALE of a folder: what was listed last stands, and it is said"
    run(tmp_path/'ann/runs/x'); m = Monitor(tmp_path, team=TEAM); before = rows_of(m.look()); real,lost = os.scandir,OSError(errno.ESTALE, 'Stale file handle')
    class Bad:
        def __init__(self, e): self.e,self.name,self.path = e,e.name,e.path
        def __getattr__(self, k): return getattr(self.e, k)
        def stat(self): raise lost
    def scandir(p):
        if call=='scandir' and str(p).endswith('ann'): raise lost
        return [Bad(e) for e in real(p)] if call=='stat' and str(p)!=str(tmp_path) and str(p).endswith('ann') else real(p)
    with monkeypatch.context() as mp: mp.setattr(os, 'scandir', scandir); s = m.look()
    assert rows_of(s)==before and len(s['listing']['unseen'])==1 and 'Stale file handle' in s['listing']['unseen'][0] and rung(s)==[('unreadable', '')]
    assert rung(m.look())==[]

def test_a_real_training_that_meets_a_nan(tmp_path):
    "It refuses the step, so no row says so; its last words do"
    import torch
    from deepfake_nb.training import TrainConfig,TrainingError,train
    def loader(cursor):
        while True: yield torch.randn(4, 3)
    seen = []
    def loss(m, b): seen.append(1); return dict(loss=m(b).square().mean()*(math.nan if len(seen)>5 else 1.))
    with pytest.raises(TrainingError): train(torch.nn.Linear(3, 1), loader, loss, TrainConfig(steps=10, device='cpu', precision='fp32'), folder=tmp_path/'checkpoints/net', journal=Journal(tmp_path/'ann/runs/x', every=0.), progress=False)
    s = Monitor(tmp_path, team=TEAM).look(); assert rung(s)==[('nan', 'ann/runs/x')] and 'loss of step 6 is nan' in s['alarms'][0]['words']
    j = Journal(tmp_path/'ben/runs/y', every=0.); j.log(step=1, loss=.5, norm=math.nan, evaluation=dict(auc=math.nan, real=math.nan, fake=.5)); j.beat(step=1); j.close()
    r = Monitor(tmp_path/'ben', team=TEAM).look()['runs'][0]; assert r['odd']==dict(norm=1, auc=1, real=1) and r['auc']=='nan'

# ---- what cannot be read

def deep(folder, n=1200):
    "Folders in each other, deeper than a path can say"
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(n): os.mkdir('d', dir_fd=fd); new = os.open('d', os.O_RDONLY, dir_fd=fd); os.close(fd); fd = new
    os.close(fd)

def test_hostile_files(tmp_path):
    "Pipes, devices, links in a circle, a thousand folders: each is named, and the run beside them is watched"
    run(tmp_path/'ann/runs/well'); evil = [tmp_path/f'ben/runs/{k}' for k in ('pipe','zero','circle','nowhere')]
    for d in evil: d.mkdir(parents=True)
    os.mkfifo(evil[0]/'status.json'); (evil[1]/'run.json').symlink_to('/dev/zero'); (evil[2]/'metrics.jsonl').symlink_to('metrics.jsonl'); (evil[3]/'status.json').symlink_to('/nowhere'); (tmp_path/'ben/loop').symlink_to('..')
    pid = fork(lambda: deep(tmp_path)); assert ended(pid)==0
    try: s = Monitor(tmp_path, team=TEAM).look()
    finally: subprocess.run(['rm', '-rf', tmp_path/'d'], check=True)
    assert s['counts']==dict(running=1) and sorted(u.split('/')[2] for u in s['listing']['unseen'])==['circle','nowhere','pipe','zero'] and {a['kind'] for a in s['alarms']}-{'disk'}=={'unreadable'}
    src = monitor.Source(tmp_path); got, = src.read([('ben/runs/pipe/status.json', None, None)]); assert isinstance(got, OSError) # it became one after it was listed

def test_closed_files_and_folders(tmp_path):
    "As somebody who may not read: a closed file, a closed folder"
    with tempfile.TemporaryDirectory() as top:
        top = Path(top); a,b = run(top/'ann/runs/x'),run(top/'ben/runs/y'); run(top/'eve/runs/z'); top.chmod(0o755)
        def nobody():
            if os.geteuid()==0: os.setgid(65534); os.setuid(65534)
            s = Monitor(top, team=TEAM).look(); r = {r['run']:r for r in s['runs']}
            assert set(r)=={'ann/runs/x','eve/runs/z'} and 'PermissionError' in r['ann/runs/x']['unreadable'] and r['eve/runs/z']['state']=='running'
            assert sorted(rung(s))==[('unreadable', ''),('unreadable', 'ann/runs/x')] and len(s['listing']['unseen'])==1 and s['listing']['unseen'][0].startswith('ben: PermissionError')
            return monitor_main([str(top), '--once'])
        for p in a.iterdir(): p.chmod(0)
        (top/'ben').chmod(0)
        try: assert ended(fork(nobody))==3
        finally: (top/'ben').chmod(0o700)

def test_a_line_without_an_end(tmp_path, monkeypatch):
    "Zeros without a newline: memory stays small, it is one broken line, it is read once, and what comes behind it counts"
    d = tmp_path/'ann/runs/x'; d.mkdir(parents=True); f = d/'metrics.jsonl'; f.write_bytes(b'{"step": 1, "loss": 0.5}\n'); os.truncate(f, 60*2**20)
    m = Monitor(tmp_path, team=TEAM); tracemalloc.start(); r = m.look()['runs'][0]; peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert (r['rows'], r['broken'], r['torn'], r['unreadable'])==(1, 1, 0, '') and peak<30e6
    asked = []; whole = monitor.Source._piece; monkeypatch.setattr(monitor.Source, '_piece', lambda self, p, a, b: (asked.append((b or 0)-(a or 0)), whole(self, p, a, b))[1])
    with open(f, 'ab') as o: o.write(b'\0\n{"step": 2, "loss": 0.4}\n')
    r = m.look()['runs'][0]; assert (r['rows'], r['broken'], r['step'])==(2, 1, 2) and sum(asked)<200
    monkeypatch.setattr(monitor, 'ROUNDS', 3); m = Monitor(tmp_path, team=TEAM); assert 'left for the next look' in m.look()['runs'][0]['unreadable']
    for _ in range(10): r = m.look()['runs'][0]
    assert (r['rows'], r['broken'], r['unreadable'])==(2, 1, '')

# ---- addresses

class Quiet(SimpleHTTPRequestHandler):
    sick = False
    def log_message(self, *a): pass
    def do_GET(self): self.send_error(500) if Quiet.sick else super().do_GET()
    def do_HEAD(self): self.send_error(500) if Quiet.sick else super().do_HEAD()

def small(folder):
    j = Journal(folder/'ann/runs/one', every=0.)
    for n in range(1, 31): j.log(step=n, loss=1/n)
    j.beat(step=30, steps=40); j.close(); write_json(folder/'ann/runs/one/run.json', dict(stage='phase_a', status='running', parameters={}))
    (folder/'person_1/BG-1/pod').mkdir(parents=True); (folder/'person_1/BG-1/pod/metrics.jsonl').write_text('{"step": 1, "loss": 0.5}\nbroken\n{"st')

def test_folder_file_memory_and_http_say_the_same(tmp_path):
    import fsspec
    small(tmp_path); mem = fsspec.filesystem('memory')
    for p in tmp_path.rglob('*'):
        if p.is_file(): mem.pipe(f'/monitored/{p.relative_to(tmp_path)}', p.read_bytes())
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(tmp_path))); threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f'http://127.0.0.1:{server.server_address[1]}/'; ms = [Monitor(x, team=TEAM) for x in (tmp_path, f'file://{tmp_path}', 'memory://monitored', url)]
        first,*others = [rows_of(m.look()) for m in ms]; assert [r['step'] for r in first]==[30,1] and first[1]['broken']==1 and first[1]['torn']==4
        for o in others: assert o==first
        with open(tmp_path/'ann/runs/one/metrics.jsonl', 'a') as f: f.write('{"step": 31, "loss": 0.01}\n') # the server knows no ranges, and is asked for one
        assert ms[3].look()['runs'][0]['rows']==31
        Quiet.sick = True; s = ms[3].look(); assert [r['rows'] for r in s['runs']]==[31,1] and s['listing']['error']; Quiet.sick = False; assert not ms[3].look()['listing']['error']
    finally: Quiet.sick = False; server.shutdown(); server.server_close(); mem.rm('/monitored', recursive=True)

class Timeless(Quiet):
    def send_header(self, k, v): k=='Last-Modified' or super().send_header(k, v)

def test_an_address_without_times(tmp_path, capsys):
    "Seen once, nobody knows whether it lives: that is said and rings; who has changed at the second look is alive"
    old(run(tmp_path/'ann/runs/x')); alive = threading.Event()
    def beats():
        j = Journal(tmp_path/'ann/runs/x', every=0.)
        while alive.is_set(): j.beat(step=2, said=time.time()); time.sleep(.05)
        j.close()
    for handler,beating in ((Quiet, False),(Timeless, False),(Timeless, True)):
        server = ThreadingHTTPServer(('127.0.0.1', 0), partial(handler, directory=str(tmp_path))); threading.Thread(target=server.serve_forever, daemon=True).start()
        if beating: alive.set(); w = threading.Thread(target=beats); w.start()
        try:
            url = f'http://127.0.0.1:{server.server_address[1]}/'; s = Monitor(url, team=TEAM).look(); assert s['counts']==({'running':1} if handler is Timeless else {'crashed':1})
            if handler is Timeless: assert rung(s)==[('unreadable', 'ann/runs/x')] and s['runs'][0]['beat_age'] is None and 'nobody says yet' in overview(s, 200)[2]
            code,out = monitor_main([url, '--once', '--every', '.4']),capsys.readouterr().out; assert 'ALARM' not in out.replace('ALARM disk', '') if beating else code==3 and ('ALARM unreadable' in out)==(handler is Timeless)
        finally:
            server.shutdown(); server.server_close()
            if beating: alive.clear(); w.join()

def test_an_address_that_says_no_lengths(tmp_path, monkeypatch, capsys):
    "Rows need a length; a status without length or time is read all the same, and asked for once; `--once` looks again after five seconds, whatever --every says"
    run(tmp_path/'ann/runs/x'); heads = []
    class Mute(Timeless):
        shy = ('status.json',)
        def send_header(self, k, v): k=='Content-Length' and self.path.endswith(self.shy) or super().send_header(k, v)
        def do_HEAD(self): heads.append(self.path.rpartition('/')[2]); super().do_HEAD()
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Mute, directory=str(tmp_path))); threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url,waits = f'http://127.0.0.1:{server.server_address[1]}/',[]; m = Monitor(url, team=TEAM); assert m.look()['runs'][0]['step']==1
        (tmp_path/'ann/runs/x/status.json').write_text('{"state": "running", "step": 2}'); heads.clear(); assert m.look()['runs'][0]['step']==2 and heads==['metrics.jsonl']
        with monkeypatch.context() as mp: mp.setattr(time, 'sleep', waits.append); assert monitor_main([url, '--once', '--every', '900'])==3 and waits==[5.]
        Mute.shy = ('.jsonl',)
        with pytest.raises(MonitorError, match='how long .*metrics.jsonl'): Monitor(url, team=TEAM).look()
    finally: server.shutdown(); server.server_close()

class Bucket(Quiet):
    "As much of S3 as a reader needs: list, size, ranges"
    def files(self): return {p.relative_to(self.directory).as_posix():p for p in sorted(Path(self.directory).rglob('*')) if p.is_file()}
    def answer(self, code, body, kind='application/xml', **heads):
        self.send_response(code); self.send_header('Content-Type', kind)
        for k,v in (dict(Content_Length=len(body))|heads).items(): self.send_header(k.replace('_', '-'), v)
        self.end_headers()
        if self.command!='HEAD': self.wfile.write(body)
    def do_GET(self):
        u = urlparse(self.path); key,q = unquote(u.path).partition('/team/')[2],parse_qs(u.query)
        if Quiet.sick: return self.answer(403, b'<Error><Code>AccessDenied</Code></Error>')
        if not key and q.get('list-type'):
            rows = ''.join(f'<Contents><Key>{escape(k)}</Key><LastModified>{datetime.fromtimestamp(p.stat().st_mtime, timezone.utc):%Y-%m-%dT%H:%M:%S.000Z}</LastModified><ETag>"{p.stat().st_mtime_ns}"</ETag><Size>{p.stat().st_size}</Size></Contents>' for k,p in self.files().items() if k.startswith(q.get('prefix', [''])[0]))
            return self.answer(200, f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>team</Name><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>'.encode())
        if key not in self.files(): return self.answer(404, b'<Error><Code>NoSuchKey</Code></Error>')
        data = self.files()[key].read_bytes(); r = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        self.asked.append((key, len(part := data[int(r[1]):int(r[2] or len(data))+1] if r else data)))
        self.answer(206 if r else 200, part, 'binary/octet-stream', ETag='"x"', **dict(Content_Range=f'bytes {r[1]}-{int(r[1])+len(part)-1}/{len(data)}') if r else {})
    do_HEAD = do_GET
    asked = []

def test_a_bucket(tmp_path, monkeypatch):
    "s3:// through s3fs: one flat listing, and of what has grown only the new bytes"
    small(tmp_path); server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Bucket, directory=str(tmp_path))); threading.Thread(target=server.serve_forever, daemon=True).start()
    for k,v in dict(AWS_ENDPOINT_URL=f'http://127.0.0.1:{server.server_address[1]}', AWS_ACCESS_KEY_ID='x', AWS_SECRET_ACCESS_KEY='x', AWS_DEFAULT_REGION='us-east-1', AWS_MAX_ATTEMPTS='1').items(): monkeypatch.setenv(k, v)
    try:
        far,near = Monitor('s3://team/', team=TEAM),Monitor(tmp_path, team=TEAM); assert rows_of(far.look())==rows_of(near.look())
        with open(tmp_path/'ann/runs/one/metrics.jsonl', 'a') as f: f.write('{"step": 31, "loss": 0.01}\n')
        Bucket.asked.clear(); assert far.look()['runs'][0]['rows']==31 and [(k, n<=64+27) for k,n in Bucket.asked]==[('ann/runs/one/metrics.jsonl', True)]
        Quiet.sick = True; s = far.look(); assert s['listing']['error'] and [r['rows'] for r in s['runs']]==[31,1]; Quiet.sick = False; assert not far.look()['listing']['error']
    finally: Quiet.sick = False; server.shutdown(); server.server_close()

# ---- TensorBoard, page, command

def test_tensorboard_reads_the_same_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    j = Journal(tmp_path/'share/CM/host', every=0.)
    def train(a, b):
        for n in range(a, b):
            j.log(step=n, loss=1/(1+n), lr=1e-4)
            if n%10==0: j.log(step=n, evaluation=dict(auc=.5+n/1000, real=.8, fake=.7, alarm=''))
    for a,b in ((0, 50), (50, 80), (80, 81)): # three lives of the monitor, several looks each
        m,ev = Monitor(tmp_path/'share', rows=True, team=TEAM),Events(tmp_path/'tb')
        for k in range(a, b): train(k, k+1); m.look(); m.events(ev)
        ev.close()
    acc = EventAccumulator(str(tmp_path/'tb/CM/host'), size_guidance=dict(scalars=0, tensors=0)).Reload(); tags = acc.Tags()
    value = lambda tag: [(e.step, round(e.wall_time, 3), e.value) for e in acc.Scalars(tag)] if tag in tags['scalars'] else [(e.step, round(e.wall_time, 3), e.tensor_proto.float_val[0]) for e in acc.Tensors(tag)]
    for tag,rows in (('loss', [(r['step'], r['time'], r['loss']) for r in j.rows if 'loss' in r]), ('evaluation/auc', [(r['step'], r['time'], r['evaluation']['auc']) for r in j.rows if 'evaluation' in r])):
        got = value(tag); assert [x[:2] for x in got]==[(s,t) for s,t,_ in rows] and max(abs(a[2]-b[2]) for a,b in zip(got, rows))<1e-6 and len(got)==len(rows)

def test_tensorboard_after_a_kill_at_any_byte(tmp_path):
    j = Journal(tmp_path/'share/CM/host', every=0.); [j.log(step=n, loss=1/(1+n)) for n in range(12)]
    m,ev = Monitor(tmp_path/'share', rows=True, team=TEAM),Events(tmp_path/'tb'); m.look(); m.events(ev); ev.close()
    f, = (tmp_path/'tb/CM/host').iterdir(); data = f.read_bytes(); good,n = 0,count(20)
    for seed in range(n):
        for p in (tmp_path/'tb/CM/host').iterdir(): p.unlink()
        f.write_bytes(data[:random.Random(seed).randint(0, len(data))]); m,ev = Monitor(tmp_path/'share', rows=True, team=TEAM),Events(tmp_path/'tb'); m.look(); m.events(ev); ev.close()
        good += [(e[1], e[2]) for e in read_events(tmp_path/'tb/CM/host')]==[(r['step'], pytest.approx(dict(loss=r['loss']))) for r in j.rows]
    told(good, n, 'event files cut anywhere are completed', 0)

def test_tensorboard_of_names_alike_and_of_many_runs(tmp_path):
    "`person 1` and `person_1` have directories of their own; a key that is no text is a tag; a hundred runs need few open files"
    for who in ('person 1','person_1',*(f'p{i}' for i in range(100))): j = Journal(tmp_path/f'share/{who}/runs/x', every=0.); j.log(step=1, loss=.5, **{'\ud800':1.}); j.close()
    def few():
        n = len(os.listdir('/proc/self/fd')); resource.setrlimit(resource.RLIMIT_NOFILE, (n+20, n+20))
        for want in (102, 0): m,ev = Monitor(tmp_path/'share', rows=True, team=TEAM),Events(tmp_path/'tb'); m.look(); assert m.events(ev)==want; ev.close()
        a,b = (list(read_events(ev.home(f'{p}/runs/x'))) for p in ('person 1','person_1')); assert a[0][2]==b[0][2]=={'loss':.5, '?':1.} and len(a)==len(b)==1
    import tensorboard.compat.proto.event_pb2,tensorboard.compat.proto.summary_pb2,tensorboard.summary.writer.record_writer,tensorboard.backend.event_processing.event_file_loader
    assert ended(fork(few))==0

class Tags(HTMLParser):
    def __init__(self): super().__init__(); self.seen = set()
    def handle_starttag(self, tag, attrs): self.seen.add(tag); assert not any(k.startswith('on') or 'javascript' in (v or '').lower() for k,v in attrs), (tag, attrs)

def test_hostile_names_stay_words(tmp_path):
    evil = '<script>alert(1)<svg onload=x>"\'\x1b[31m\u202e&'.replace('/', '')
    j = Journal(tmp_path/evil/'runs'/'a" onmouseover="x', every=0.); j.log(step=1, loss=.5, chunk=evil, said=evil); j.beat('failed', step=1, error=evil); j.close()
    write_json(tmp_path/evil/'runs'/'a" onmouseover="x'/'run.json', dict(stage=evil, status='failed', reason=evil, parameters=dict(specialist=evil, stage=evil)))
    s = Monitor(tmp_path, team=TEAM).look(); p = Tags(); p.feed(monitor_page(s, tmp_path/'p.html').read_text())
    assert 'script' not in p.seen and 'img' not in p.seen and {'table','caption','th'}<=p.seen and s['runs'][0]['state']=='crashed'
    assert not any(c in ''.join(overview(s)) for c in '\x1b\u202e')

@pytest.mark.parametrize('text', ['[]', '{"state": 5, "step": {}, "loss": [], "checkpoint": "x", "time": "y"}', '{"state": "running", "step": 1e999, "checkpoint": NaN}', '{'*100_000, '"', 'null', '{"state": [], "status": {}, "parameters": [1], "metrics": [2], "stage": {"a": 1}, "started": 5, "checkpoint": 1e308, "pid": 1e99, "pid_started": -1, "host": []}', '{"status": "running", "pid": 1e99, "pid_started": "x", "parameters": {"seed": [], "specialist": {}, "stage": [], "limit_gb": "x", "checkpoints": 7}}', '{"checkpoint": -1, "dollars": -5, "left": null, "spent": true}'])
def test_files_that_say_nonsense(tmp_path, text):
    d = tmp_path/'x/runs/y'; d.mkdir(parents=True)
    for n in ('status.json','run.json'): (d/n).write_text(text)
    (d/'metrics.jsonl').write_text(f'{text}\n{{"time": "a", "step": "b", "loss": {{}}, "evaluation": 7, "chunk": []}}\n{{"step": 1, "evaluation": {{"auc": "x", "real": null, "fake": "nan", "alarm": 3}}}}\n{{"time": 1e308, "step": -1e308, "loss": 1e308}}\n')
    m = Monitor(tmp_path, team=TEAM, rows=True); s = m.look(); m.events(ev := Events(tmp_path/'tb')); ev.close()
    assert len(s['runs'])==1 and page(s) and overview(s); json.dumps(__import__('deepfake_nb.journal', fromlist=['plain']).plain(s), allow_nan=False)

def cli(*args): return subprocess.run([sys.executable, '-c', 'import sys; from deepfake_nb.monitor import monitor_main; sys.exit(monitor_main(sys.argv[1:]))', *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=120)

def test_command(tmp_path):
    small(tmp_path/'share'); led = Ledger(tmp_path/'ledger.json', dict(train=5.)); led.charge(3600., 'train', 'x', 1.)
    r = cli(tmp_path/'share', '--once', '--json', '-', '--ledger', tmp_path/'ledger.json'); s = json.loads(r.stdout); bad = [a for a in s['alarms'] if a['kind']!='disk'] # this machine's disk may really be full
    assert r.returncode==(3 if s['alarms'] else 0) and bad==[] and r.stderr=='' and s['money']['purses']==[dict(purse='train', dollars=5., spent=1., left=4.)]
    led.charge(3.8*3600, 'train', 'x', 1.); r = cli(tmp_path/'share', '--once', '--ledger', tmp_path/'ledger.json', '--html', tmp_path/'p.html'); assert r.returncode==3 and 'ALARM budget' in r.stdout and 'Purses' in (tmp_path/'p.html').read_text()
    (tmp_path/'empty').mkdir(); r = cli(tmp_path/'empty', '--once'); assert r.stdout.startswith('no runs yet') and r.returncode==(3 if 'ALARM' in r.stdout else 4)
    r = cli(tmp_path/'none', '--once'); assert (r.returncode, r.stdout)==(1, '') and r.stderr.startswith('deepfake-nb monitor: ') and 'Remedy: ' in r.stderr and 'Traceback' not in r.stderr
    (tmp_path/'plan/tasks').mkdir(parents=True); write_json(tmp_path/'plan/tasks/a.json', dict(state='failed', reason='out of memory')); os.mkfifo(tmp_path/'plan/tasks/b.json')
    r = cli(tmp_path/'share', '--once', '--plan', tmp_path/'plan'); assert r.returncode==3 and 'plan plan: 1 failed' in r.stdout and 'a failed: out of memory' in r.stdout and 'ALARM plan: b.json' in r.stdout
    assert Monitor(tmp_path/'share', checkpoints='memory://monitored', team=TEAM).disk()['free']>0 # the checkpoints are far away, the disk of the runs is not
    assert cli('--every', 'x').returncode==2 and cli('nosuch://x', '--once').returncode==1
