"Renting, sweeping and stopping: random worlds in which most layers are dead and the provider lies, each layer alone, each layer broken on purpose; then real time-outs, signals, shells, and a search for the key in everything that was written"
import contextlib,hashlib,io,json,math,os,random,re,shlex,signal,subprocess,sys,threading,time
from pathlib import Path
import psutil,pytest
from common import count,told,wait_for
from fake_runpod import BENT,FAULTS,ODD,Fake,World
from deepfake_nb import guard,pod as P
from deepfake_nb.pod import Key,Order,PodError,Refused,RunPod,SLACK,Unsure,pod_main,proved,pull,send,start_command

ROOT = Path(__file__).resolve().parents[1]
KEY = 'rpa_PLANTED0123456789abcdef'
REPO,COMMIT = 'https://127.0.0.1/deepfake-nb/deepfake_nb','0'*39+'1'
LAYERS = ('deadline','runner','pod_runner','idle','sweep')

@pytest.fixture(autouse=True)
def key(monkeypatch): monkeypatch.setenv('RUNPOD_API_KEY', KEY); monkeypatch.delenv('DEEPFAKE_NB_RUNPOD_API', raising=False)

# --- random worlds
def play(folder, seed, only=None, broken=None, cls=RunPod):
    "One world: who is alive, what goes wrong, until when; seconds that some pod was billed beyond its bound, and what was done"
    rng = random.Random(seed); hours = rng.choice([.15,.25,.4]); w = World(folder, seed, key=KEY); f = w.fake; t0 = f.now(); end = t0+hours*3600
    sure = only or rng.choice(LAYERS); alive = {sure}|set(() if only else rng.sample(LAYERS, rng.randint(0, 4)))
    well = end+rng.uniform(-600, 900); windows = [sorted(rng.uniform(t0, well) for _ in '12') for _ in range(rng.randint(0, 3))]+[(rng.uniform(end-120, well), well)]*(rng.random()<.8)+[(t0, t0+rng.uniform(0, 300))]*(rng.random()<.4)
    kinds,p = rng.sample([*FAULTS,'stale','empty','odd'], rng.randint(1, 4)),rng.choice([.3,.7,1.])
    f.fault = lambda m, path: rng.choice(kinds) if f.now()<well and any(a<=f.now()<b for a,b in windows) and rng.random()<p else None
    if rng.random()<.5: until = rng.uniform(t0, well); f.deaf = lambda id: f.now()<until
    f.slow,f.boot,f.page,f.price = rng.choice([0,0,15,30]),rng.choice([0,20,60]),rng.choice([1,2,1000]),rng.choice([.39]*6+[.8])
    for i in range(rng.randint(0, 3)): f.make(dict(name=rng.choice([f'somebody-elses-{i}','',None])), bend=rng.choice([{}, *BENT[:8]])) # nobody's business
    ends = rng.uniform(30, max(40, hours*3600-400)); how = rng.choice([KeyboardInterrupt,SystemExit,ZeroDivisionError]); w.expected = (KeyboardInterrupt,SystemExit,ZeroDivisionError,PodError,OSError)
    kw = dict(deadline={}, runner=dict(ends=rng.choice([0, 0, ends]), how=how, bring=rng.choice([None, lambda: None, threading.Event().wait])), pod_runner=dict(ends=rng.choice([0, 0, ends]), unshipped=rng.random()<.3), idle=dict(ends=ends, minutes=rng.choice([2,4])), sweep={})
    if broken: kw[only] |= broken
    sweeps = []; kw['sweep'] = dict(sweep=lambda api: sweeps.append(checked(f, api)))
    victims = []
    def on_pod(id):
        for n in ('deadline','pod_runner','idle'):
            if n in alive and (f.pods[id]['name'] or '').startswith('dfnb'):
                got = w.layer(n, id, None, end, **kw[n])
                if n!=sure and rng.random()<.3: f.clock.at(f.now()+rng.uniform(0, hours*4000), lambda: w.end_shell(id) if n=='deadline' else w.kill(got))
    f.booted = on_pod
    api = w.client(cls, send); order = Order(hours, 5., volume='vol1', label='soak')
    def laptop():
        made = api.launch(order, start_command(hours, end, REPO, COMMIT))
        if 'runner' in alive: w._runner(made.id, api, end, kw['runner'])
    lap = w.live(laptop)
    if 'runner' not in alive or sure!='runner' and rng.random()<.4:
        if sure!='runner' and rng.random()<.7: f.clock.at(t0+rng.choice([rng.uniform(0, 60), rng.uniform(0, hours*3600)]), lambda: w.kill(lap))
    if 'sweep' in alive:
        got = w.layer('sweep', None, w.client(cls, send), end, **kw['sweep'])
        if sure!='sweep' and rng.random()<.3: f.clock.at(t0+rng.uniform(0, hours*4000), lambda: w.kill(got))
    f.clock.at(max(well, end)+600, f.clock.end)
    w.run(9)
    ours = [p for p in f.pods.values() if (p['name'] or '').startswith('dfnb')]
    late = max([(p['end'] or f.now())-max(well, p['born']+hours*3600) for p in ours], default=-math.inf)
    return late,dict(seed=seed, alive=sorted(alive), sure=sure, kinds=kinds, pods=len(ours), touched=[p for p in f.pods.values() if not (p['name'] or '').startswith('dfnb') and p['end']], unsure=[s for s in sweeps if s])

def checked(fake, api):
    "A sweep that says `nothing overdue` while something is, though no list has lied; its name, or ''"
    n = len(fake.calls); code = api.sweep().code
    lied = any(c[3] in ('stale','empty') for c in fake.calls[n:])
    over = [p['name'] for p in fake.pods.values() if (p['name'] or '').startswith('dfnb') and p['end'] is None and fake.now()-p['born']>=P.ttl_of(p['name'])*3600+1]
    return str(over) if code in (0,3) and over and not lied else ''

def test_no_path_leaves_a_paid_pod(tmp_path):
    n = count(15); seed = 53; bad,pods = [],0
    for i in range(n):
        late,what = play(tmp_path/str(i), seed*1000+i); pods += what['pods']
        if late>SLACK or what['touched'] or what['unsure'] or what['pods']>1: bad.append((late, what))
    assert not bad, bad
    assert pods>n/2
    told(n-len(bad), n, f'worlds in which no pod was billed {SLACK} s beyond what could be helped ({pods} pods)', seed)

@pytest.mark.parametrize('layer', LAYERS)
def test_each_layer_alone(tmp_path, layer):
    n = count(4)//(8 if 'SOAK' in os.environ else 1); bad = []
    for i in range(n):
        rng = random.Random(f'{layer}{i}'); w = World(tmp_path/str(i), i, key=KEY); f = w.fake; hours = .2; end = f.now()+hours*3600; fault = rng.choice([*FAULTS,'odd','deaf','slow','none']); a,b = end-rng.uniform(0, 200),end+rng.uniform(0, 400)
        f.fault = lambda m, p: fault if fault in (*FAULTS,'odd') and a<=f.now()<b else None
        if fault=='deaf': f.deaf = lambda id: f.now()<b
        f.slow = 30 if fault=='slow' else 0
        made = f.make(dict(name=f'dfnb-ttl{hours:g}-x')); w.expected = (KeyboardInterrupt,)
        w.layer(layer, made['id'], w.client(RunPod, send), end, **(dict(ends=300, minutes=5) if layer=='idle' else {})); w.run(3)
        late = (made['end'] or math.inf)-max(end, b if fault in [*FAULTS,'odd','deaf'] else 0)
        if late>SLACK: bad.append((fault, late))
    assert not bad, bad

# --- bugs planted on purpose: the test above must find each
def once(api, id): api.ask('POST', f'/pods/{id}/action', dict(action='stop'))
class OneTry(RunPod):
    def stop(self, id, patience=math.inf): once(self, id)
class ThreeTries(RunPod):
    def stop(self, id, patience=math.inf): return super().stop(id, 5)
class FirstPage(RunPod):
    def pods(self, patience=90.): return [P.Pod.of(d) for d in self.call('GET', '/pods', patience=patience)['pods']]
class NewestStart(RunPod):
    def age(self, pod): return 0.

def late_with(tmp_path, layer, cls=RunPod, trouble='500', minutes=8, **kw):
    "The layer alone, broken, while the provider is out of order around the deadline"
    w = World(tmp_path, key=KEY); f = w.fake; end = f.now()+.2*3600; well = end+60*minutes; f.page = kw.pop('page', 1000); w.expected = (PodError,)
    f.fault = lambda m, p: trouble if end-60<=f.now()<well else None
    for i in range(kw.pop('others', 0)): f.make(dict(name=f'dfnb-ttl9-{i}'))
    made = f.make(dict(name='dfnb-ttl0.2-x')); f.clock.at(well+1200, f.clock.end)
    w.layer(layer, made['id'], w.client(cls, send), end, **kw); w.run(3)
    return (made['end'] or math.inf)-well

BUGS = dict(
    deadline_asks_once=dict(layer='deadline', script='sleep %d; runpodctl pod stop "$RUNPOD_POD_ID"'), deadline_gives_up=dict(layer='deadline', script='sleep %d; for i in 1 2 3; do runpodctl pod stop "$RUNPOD_POD_ID" && break; sleep 15; done'),
    deadline_waits_for_success=dict(layer='deadline', script='sleep %d && false && switch 0', trouble=None), runner_asks_once=dict(layer='runner', cls=OneTry), runner_gives_up=dict(layer='runner', cls=ThreeTries),
    watchdog_gives_up=dict(layer='idle', ends=360, minutes_=6, tries=3), sweep_reads_one_page=dict(layer='sweep', cls=FirstPage, page=1, others=2, trouble=None), sweep_counts_from_the_last_start=dict(layer='sweep', cls=NewestStart))

@pytest.mark.parametrize('bug', BUGS)
def test_a_planted_bug_is_found(tmp_path, bug):
    kw = dict(BUGS[bug]); sound = {k:v for k,v in kw.items() if k in ('layer','page','others','trouble','ends')}
    if kw.pop('tries', None): fake = {}; kw['stop'] = lambda: guard.stop_self({'REST':lambda: guard.ask_rest('stop', 'pod001', KEY, fake['url'])}, sleep=fake['clock'].sleep, say=lambda s: None, tries=3)
    kw.pop('minutes_', None)
    if 'stop' in kw:
        real = World.layer
        def layer(self, *a, **k): fake.update(url=self.fake.url, clock=self.clock); return real(self, *a, **k)
        with pytest.MonkeyPatch.context() as m: m.setattr(World, 'layer', layer); assert late_with(tmp_path/'bad', **kw)>SLACK
    else: assert late_with(tmp_path/'bad', **kw)>SLACK
    assert late_with(tmp_path/'good', **sound)<=SLACK # the same trouble, without the bug

@pytest.mark.parametrize('layer,bug', [('deadline', dict(broken=dict(script='sleep %d; runpodctl pod stop "$RUNPOD_POD_ID"'))), ('runner', dict(cls=ThreeTries)), ('sweep', dict(cls=NewestStart)), ('idle', dict(broken=dict(stop=lambda: None))), ('pod_runner', dict(broken=dict(stop=lambda: None)))])
def test_random_worlds_find_it_too(tmp_path, layer, bug):
    assert any(play(tmp_path/str(i), i, only=layer, **bug)[0]>SLACK for i in range(20)), 'twenty worlds did not notice'

def test_a_failed_listing_taken_for_an_empty_one_is_found(tmp_path, monkeypatch):
    def seen(api_class):
        w = World(tmp_path, key=KEY); f = w.fake; f.make(dict(name='dfnb-ttl1-x'), createdAt=f.now()-7200); f.fault = lambda m, p: '500'; res = []; w.expected = (Unsure,)
        w.live(lambda: res.append(checked(f, w.client(api_class, send)))); w.run(1); return res
    class Empty(RunPod):
        def pods(self, patience=90.):
            try: return super().pods(patience)
            except PodError: return []
    assert seen(Empty)==["['dfnb-ttl1-x']"] # it said: nothing overdue
    assert seen(RunPod)==[] # it said nothing, and raised

@pytest.mark.parametrize('fault', ['late','500+','half'])
def test_created_twice_is_found(tmp_path, fault):
    class Again(RunPod):
        def create(self, body): return P.Pod.of(self.call('POST', '/pods', body))
    def made(cls):
        it = iter([fault]); w = World(tmp_path/cls.__name__, key=KEY, fault=lambda m, p: next(it, None) if m=='POST' else None); api = w.client(cls, send)
        w.live(lambda: api.create(dict(name='dfnb-ttl1-x-1'))); w.run(1); return len(w.fake.pods)
    assert (made(RunPod),made(Again))==(1,2)

# --- real time
def real(fake, **kw): return RunPod(url=fake.url, **dict(dict(seconds=.5), **kw))

@pytest.mark.parametrize('fault', ['hang','drip','down','half','garbage'])
def test_time_outs_are_real(fault):
    with Fake(key=KEY, fault=lambda m, p: fault) as f:
        start = time.monotonic()
        with pytest.raises(Unsure): real(f).ask('GET', '/pods')
        assert time.monotonic()-start<2.5

def test_a_wrong_key_is_refused_and_not_repeated():
    with Fake(key='another') as f:
        with pytest.raises(Refused, match='401'): real(f).call('GET', '/pods')
        with pytest.raises(Refused): real(f).sweep()
        assert pod_main(['sweep','--api',f.url])==1

def test_a_time_without_zone_is_utc():
    with pytest.MonkeyPatch.context() as m:
        m.setenv('TZ', 'America/New_York'); time.tzset()
        with Fake(key=KEY) as f:
            ours = f.make(dict(name='dfnb-ttl1-x'), bend=dict(createdAt=time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(f.now()-1800)))); api = real(f); assert .49<api.age(api.pods()[0])<.51
            f.skew = 0; api._send = lambda *a, **k: (lambda s, h, b: (s,dict(h)|{'Date':h['Date'].replace('GMT', '-0000')},b))(*send(*a, **k)); api.pods(); assert abs(api.drift)<2
    time.tzset()

def test_a_redirect_takes_the_key_nowhere():
    got = []
    class Moved(Fake):
        def answer(self, *a): got.append(a[1]); return 307,dict(title='moved')
    with Moved(key=KEY) as f:
        with pytest.raises(Unsure): real(f).ask('GET', '/pods')
    assert got==['/v2/pods']

def test_a_time_out_of_the_provider_is_no_refusal():
    class Late(Fake):
        def answer(self, *a): return 408,dict(title='Request Timeout')
    with Late(key=KEY) as f:
        with pytest.raises(Unsure, match='408'): real(f).ask('POST', '/pods', {})

def cli(*a, env=None, **kw):
    return subprocess.run([sys.executable,'-c','import sys; from deepfake_nb.pod import pod_main; sys.exit(pod_main(sys.argv[1:]))',*map(str, a)], cwd=ROOT, env=os.environ|(env or {}), capture_output=True, text=True, timeout=120, **kw)

def test_exit_codes_of_a_cron_job(capsys):
    def code(*a): c = pod_main(['sweep','--patience','2',*a]); return c,capsys.readouterr()
    with Fake(key=KEY) as f:
        a = ['--api',f.url,'--quiet']
        f.make(dict(name='dfnb-ttl5-young')); assert code(*a)==(0,('',''))
        old = f.make(dict(name='dfnb-ttl1-old'), createdAt=f.now()-7200); c,(out,err) = code(*a); assert c==3 and 'stopped now' in out and old['status']=='EXITED'
        assert code(*a)[0]==0
        f.make(dict(name='dfnb-ttl1-deaf'), createdAt=f.now()-7200); f.deaf = lambda id: True; assert code(*a)[0]==1
        f.fault = lambda m, p: '500'; c,(out,err) = code(*a); assert c==1 and out=='' and 'Remedy' in err

class Quick:
    "A laptop whose pauses take no time: its clock jumps instead"
    def __init__(self): self.ahead = 0.
    def now(self): return time.time()+self.ahead
    def sleep(self, s): self.ahead += s; time.sleep(.002)

def here(f, *a, said='', **kw):
    "`deepfake-nb pod`, in this process; exit code, and all that was written"
    q,out,keep = Quick(),io.StringIO(),sys.stdin; sys.stdin = io.StringIO(said)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out): code = pod_main([*map(str, a)], api=RunPod(url=f.url if f else 'http://127.0.0.1:9/v2', now=q.now, sleep=q.sleep, seconds=.5, say=lambda s: print(s), **kw))
    finally: sys.stdin = keep
    return code,out.getvalue()

LAUNCH = ('launch','--hours','1','--budget','1','--repo',REPO,'--commit',COMMIT)
def test_launch_asks_first_and_leaves_nothing_that_differs():
    with Fake(key=KEY) as f:
        code,said = here(f, *LAUNCH, '--volume', 'vol1'); assert code==2 and 'nobody said yes' in said and not f.pods
        code,said = here(f, *LAUNCH, '--volume', 'vol1', said='no\n'); assert code==1 and not f.pods and 'worst case: $0.41' in said and '-X POST' in said and 'arm_deadline' in said
        code,said = here(f, *LAUNCH, '--volume', 'nowhere', '--yes'); assert code==1 and '404' in said and not f.pods
        code,said = here(f, *LAUNCH, '--volume', 'vol1', '--data-center', 'US-KS-2', '--yes'); assert code==1 and 'is in EU-RO-1' in said and not f.pods
        code,said = here(f, *LAUNCH, '--volume', 'vol1', '--detach', said='yes\n'); assert code==0 and [p['status'] for p in f.pods.values()]==['RUNNING']
        body = next(c for c in f.calls if c[1:3]==('POST','/v2/pods'))[4]; assert body['mounts']['network'][0]==dict(volumeId='vol1', path='/workspace') and body['dataCenterIds']==['EU-RO-1'] and 'arm_deadline' in body['cmd'][1]
        f.price = .9; code,said = here(f, *LAUNCH, '--volume', 'vol1', '--yes', '--detach'); assert code==1 and 'not what was asked for' in said and [p['end'] is None for p in f.pods.values()]==[True,False]

def test_launch_stays_until_the_results_are_here(tmp_path):
    with Fake(key=KEY) as f:
        def work(): wait_for(lambda: f.pods); shipped(tmp_path/'v', {'results/r.json':b'{}'}, 'pod001') # the pod, from afar
        t = threading.Thread(target=work); t.start()
        code,said = here(f, *LAUNCH, '--volume', 'vol1', '--yes', '--ssh', '--source', tmp_path/'v', '--pull', tmp_path/'h'); t.join()
        assert code==0 and 'ssh -N -L 8888:127.0.0.1:8888' in said and 'pod001: done' in said and 'results: here, and proved' in said and f.pods['pod001']['status']=='EXITED'

@pytest.mark.parametrize('bend', [dict(name=''), dict(name=None), *[dict(bend=b) for b in BENT]], ids=str)
def test_one_odd_pod_of_anybody_does_not_save_ours(bend):
    with Fake(key=KEY) as f:
        ours = f.make(dict(name='dfnb-ttl1-x'), createdAt=f.now()-7200); other = f.make(dict(name='other'), **bend); lost = bend==dict(bend=dict(id=None)) # anybody's
        code,said = here(f, 'sweep', '--patience', '5'); assert ours['status']=='EXITED' and other['end'] is None and code==(1 if lost else 3) and ('cannot be read' in said)==lost
        assert here(f, 'list')[0]==0

@pytest.mark.parametrize('answer', [*ODD, *BENT], ids=str)
def test_one_odd_answer_does_not_end_a_stop(answer):
    with Fake(key=KEY) as f:
        made = f.make(dict(name='dfnb-ttl1-x')); n = iter('ab'); f.fault = lambda m, p: next(n, None) and 'odd'; f.odd = lambda data: data|answer if answer in BENT else answer
        code,said = here(f, 'stop', 'pod001'); assert code==0 and made['status']=='EXITED' and 'EXITED' in said

def test_a_mistyped_id_is_not_gone():
    with Fake(key=KEY) as f:
        made = f.make(dict(name='dfnb-ttl1-x')); code,said = here(f, 'stop', 'pod0001'); assert code==1 and 'no such pod' in said and 'pod001 (dfnb-ttl1-x)' in said and made['end'] is None
        n = iter('abc'); f.fault = lambda m, p: next(n, None) and '500'; code,said = here(f, 'stop', 'pod0001'); assert code==1 and 'no such pod' in said
        assert here(f, 'stop', 'pod001', '--terminate', '--lose-results')[0]==0 and made['status']=='TERMINATED'

def rented(f, act, *a, volume='vol1'):
    "A launch that stays; `act()` happens when the pod is there"
    t = threading.Thread(target=lambda: (wait_for(lambda: f.pods), act())); t.start(); got = here(f, *LAUNCH, *(['--volume',volume] if volume else ['--lose-everything']), '--yes', *a); t.join(); return got

def stopped(f): wait_for(lambda: sum(c[2]=='/v2/pods/pod001' for c in f.calls)>1); f.stop('pod001') # it was seen running

def test_results_in_the_middle_are_no_end(tmp_path):
    with Fake(key=KEY) as f:
        def pod():
            shipped(tmp_path/'v', dict(half=b'1'), final=False); n = len(f.calls); wait_for(lambda: len(f.calls)>n+6); assert f.pods['pod001']['end'] is None
            shipped(tmp_path/'v', dict(half=b'1', rest=b'2'))
        code,said = rented(f, pod, '--source', tmp_path/'v', '--pull', tmp_path/'h'); assert code==0 and (tmp_path/'h/rest').exists() and 'exit code 0' in said and f.pods['pod001']['end']

def test_a_plan_that_failed_is_no_success(tmp_path):
    for pull_it in ([],['--pull',tmp_path/'h']):
        with Fake(key=KEY) as f: code,said = rented(f, lambda: shipped(tmp_path/'v', dict(a=b'1'), code=1), '--source', tmp_path/'v', *pull_it); assert code==1 and 'exit code 1' in said; (tmp_path/'v/shipped.json').unlink()
    with Fake(key=KEY) as f: code,said = rented(f, lambda: stopped(f), '--source', tmp_path/'v'); assert code==3 and 'was not shipped' in said
    with Fake(key=KEY) as f: assert rented(f, lambda: stopped(f), '--source', tmp_path/'v', '--', '--no-plan')[0]==0

def test_an_end_that_nobody_here_can_see_is_no_success(tmp_path, monkeypatch):
    for k in [k for k in os.environ if k.startswith('AWS')]: monkeypatch.delenv(k)
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
    for volume in ('vol1',''): # without its S3 keys; without any
        for plan,want in (([],3), (['--','--no-plan'],0)):
            with Fake(key=KEY) as f: code,said = rented(f, lambda: stopped(f), *plan, volume=volume); assert code==want and ('nobody here knows how the plan ended' in said)==(want==3), said

def test_the_list_of_another_pod_touches_nothing(tmp_path):
    shipped(tmp_path/'v', {'table':b'OLD'}, 'pod000'); (tmp_path/'h').mkdir(); (tmp_path/'h/table').write_text('NEW')
    with Fake(key=KEY) as f: code,said = rented(f, lambda: stopped(f), '--source', tmp_path/'v', '--pull', tmp_path/'h'); assert code==3 and 'results of pod000, not of pod001' in said and os.listdir(tmp_path/'h')==['table']
    pull(tmp_path/'v', tmp_path/'h'); old, = (tmp_path/'h').glob('table.old-*'); assert (tmp_path/'h/table').read_text()=='OLD' and old.read_text()=='NEW'
    shipped(tmp_path/'v', {'table':b'THIRD'}); pull(tmp_path/'v', tmp_path/'h'); assert (tmp_path/'h/table').read_text()=='THIRD' and len(list((tmp_path/'h').glob('table.old-*')))==1 # what was pulled is not kept twice

def test_a_pull_that_cannot_be_is_refused_before_it_costs(tmp_path, monkeypatch):
    for k in [k for k in os.environ if k.startswith('AWS')]: monkeypatch.delenv(k)
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
    with Fake(key=KEY) as f:
        p = ('--pull',tmp_path/'h','--yes')
        for a in (('--lose-everything',), ('--volume','vol1','--detach')): assert here(f, *LAUNCH, *a, *p)[0]==2 and here(f, *LAUNCH, *a, *p, '--dry-run')[0]==2
        code,said = here(f, *LAUNCH, '--volume', 'vol1', *p); assert code==2 and 'AWS_ACCESS_KEY_ID' in said and not f.pods
        (tmp_path/'file').write_text(''); assert here(f, *LAUNCH, '--volume', 'vol1', '--source', tmp_path/'file', *p)[0]==2 and not f.pods

class Full(Fake):
    "No card is available"
    def answer(self, method, path, query, body): return (409,dict(title='no card available')) if (method,path)==('POST','/v2/pods') else super().answer(method, path, query, body)

@pytest.mark.parametrize('bend', [dict(id=None), None], ids=str) # a row that nobody can read, a list that is out of order
def test_a_refused_launch_ends_whatever_the_list_says(bend):
    with Full(key=KEY) as f:
        if bend: f.make({}, bend=bend)
        def fault(m, p):
            if len(f.calls)>99: f.key = 'withdrawn' # who looks for ever is ended
            return '500' if not bend and (m,p)==('GET','/v2/pods') and any(c[1]=='POST' for c in f.calls) else None
        f.fault = fault
        code,said = here(f, *LAUNCH, '--lose-everything', '--yes'); assert code==1 and 'HTTP 409 no card available' in said.splitlines()[-1], said
        assert len(f.calls)<25 and not any(p['end'] for p in f.pods.values())

def test_a_pod_that_differs_is_stopped_though_no_list_can_be_had():
    with Fake(key=KEY, price=.9) as f:
        def fault(m, p):
            if len(f.calls)>99: f.key = 'withdrawn' # who looks for ever is ended
            return '500' if (m,p)==('GET','/v2/pods') and f.pods else None
        f.fault = fault; code,said = here(f, *LAUNCH, '--lose-everything', '--yes'); assert code==1 and 'not what was asked for' in said and f.pods['pod001']['end']

def interrupted(f, *waits):
    "A launch that hears Ctrl-C after each of these; exit code, and what was said"
    p = subprocess.Popen([sys.executable,'-c','import sys; from deepfake_nb.pod import pod_main; sys.exit(pod_main(sys.argv[1:]))',*LAUNCH,'--lose-everything','--yes','--api',f.url], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        for w in waits: n = len(f.calls); wait_for(lambda: w() and len(f.calls)>n+1); assert p.poll() is None; p.send_signal(signal.SIGINT)
        f.deaf = lambda id: False; return p.communicate(timeout=30)[1],p.returncode
    finally: p.kill(); p.wait()

def test_a_second_ctrl_c_ends_the_looking_and_not_the_stopping():
    with Fake(key=KEY) as f: # nobody knows whether there is one
        posted = lambda: any(c[1]=='POST' for c in f.calls); f.fault = lambda m, p: '500' if (m,p)==('POST','/v2/pods') or posted() and p=='/v2/pods' else None
        said,code = interrupted(f, posted, posted); assert code==1 and 'is looked for' in said and 'nobody waited' in said
    with Fake(key=KEY, price=.9) as f: # there is one, dearer than was asked for
        f.deaf = lambda id: True; asked = lambda: any('action' in c[2] for c in f.calls)
        said,code = interrupted(f, asked, asked); assert code and f.pods['pod001']['end'] and said.count('the pod is being stopped')==2

def test_interrupted_between_launch_and_watch(monkeypatch):
    real_launch = RunPod.launch
    def l(self, *a): real_launch(self, *a); raise KeyboardInterrupt
    monkeypatch.setattr(RunPod, 'launch', l)
    for a in ([],['--detach']):
        with Fake(key=KEY) as f: code,said = here(f, *LAUNCH, '--volume', 'vol1', '--yes', *a); assert code==130 and 'pod001' in said and f.pods['pod001']['end']

def test_results_that_hang_do_not_outlive_the_deadline():
    with Fake(key=KEY) as f:
        made = f.make(dict(name='dfnb-ttl1-x')); api = real(f); asked,free = [],threading.Event()
        def hangs(): asked.append(1); free.wait()
        start = time.monotonic(); assert api.follow(made['id'], api.clock()+2, hangs, every=.2)=='deadline' and time.monotonic()-start<4 and len(asked)==1; free.set()

def test_what_a_dry_run_shows_is_what_is_sent():
    with Fake(key=KEY) as f:
        code,said = here(f, *LAUNCH, '--volume', 'vol1', '--data-center', 'EU-RO-1', '--dry-run'); assert not f.calls; shown = json.loads(shlex.split(said.splitlines()[-1])[-1]); keys = json.loads(shlex.split(here(f, *LAUNCH, '--volume', 'vol1', '--dry-run')[1].splitlines()[-1])[-1])
        here(f, *LAUNCH, '--volume', 'vol1', '--yes', '--detach'); sent = next(c[4] for c in f.calls if c[1:3]==('POST','/v2/pods')); assert set(shown)==set(sent)==set(keys)
        same = lambda b: {k:v for k,v in b.items() if k not in ('name','cmd')}; assert same(shown)==same(sent); cut = lambda b: re.sub(r'left=\$\(\( \d+', '', b['cmd'][1]); assert cut(shown)==cut(sent) and "--gpu 'RTX 4090' --price 0.39" in cut(sent)
        assert here(f, 'stop', 'p', '--terminate', '--dry-run')[0]==2

def test_a_call_that_is_pasted_shows_no_key(tmp_path):
    f = tmp_path/"my key"; f.write_text(KEY); f.chmod(0o600)
    for key in (Key(),Key(f)):
        seen = []
        with Fake(key=KEY) as fake:
            fake.fault = lambda m, p: time.sleep(.5)
            p = subprocess.Popen(['sh','-c',P.curl('GET', f'{fake.url}/pods', key=key)], stdout=subprocess.PIPE, text=True)
            while p.poll() is None: seen += [' '.join(q.cmdline()) for q in [psutil.Process(),*psutil.Process().children(recursive=True)] if q.is_running() and q.status()!='zombie']; time.sleep(.02)
            assert json.loads(p.stdout.read())['pods']==[] and any(s.startswith('curl') for s in seen) and not any(KEY[4:] in s for s in seen)

def test_the_line_for_cron_runs_where_nothing_is_set(tmp_path):
    assert here(None, 'sweep', '--cron')[0]==2; k = tmp_path/'k 100%'; k.write_text(KEY); k.chmod(0o600)
    with Fake(key=KEY) as f:
        r = cli('sweep','--cron','--key-file',k,'--api',f.url, env=dict(RUNPOD_API_KEY='')); cron,alone = r.stdout.splitlines(); assert r.returncode==0 and cron.startswith('* * * * * /') and '--most' not in cron
        for line in (cron[10:].replace('\\%', '%'), alone):
            old = f.make(dict(name='dfnb-ttl1-old'), createdAt=f.now()-7200); r = subprocess.run(['/bin/sh','-c',line], env=dict(PATH='/usr/bin:/bin', HOME='/nowhere', SHELL='/bin/sh', LOGNAME='x'), cwd='/', capture_output=True, text=True, timeout=60)
            assert old['status']=='EXITED' and 'stopped now' in r.stdout and (r.returncode==3 or 'exit code 3' in r.stdout), r.stderr

def test_the_line_for_cron_is_the_sweep_that_was_asked_for(tmp_path):
    k = tmp_path/'k'; k.write_text(KEY); k.chmod(0o600)
    with Fake(key=KEY) as f:
        lines = cli('sweep','--cron','--key-file',k,'--api',f.url,'--most','1','--patience','7.5').stdout.splitlines(); assert all('--most 1.0 --patience 7.5' in l for l in lines) and len(lines)==2
        old = f.make(dict(name='dfnb-ttlsoon'), createdAt=f.now()-7200); subprocess.run(['/bin/sh','-c',lines[0][10:]], env={}, timeout=60, stdout=subprocess.DEVNULL); assert old['status']=='EXITED'

def test_dry_run_needs_no_key_and_no_network():
    r = cli('launch','--hours','1','--budget','1','--volume','v','--repo',REPO,'--commit',COMMIT,'--dry-run', env=dict(RUNPOD_API_KEY='', RUNPOD_POD_ID=''))
    assert r.returncode==0 and r.stdout.count('"$RUNPOD_API_KEY" | curl')==4, r.stderr
    for a in (['sweep'],['list'],['stop','p1','--terminate','--lose-results'],['pull','a','b']): assert here(None, *a, '--dry-run', key=Key(name='NO_SUCH_VARIABLE'))[0]==0

# --- signals: a process that watches is told to go
WATCH = '''import sys; from deepfake_nb.pod import *
api = RunPod(say=lambda s: print(s, flush=True))
with watched(api, api.pod(sys.argv[1]), api.clock()+3600): print('watching', flush=True); api.follow(sys.argv[1], api.clock()+3600, every=.2)'''

@pytest.mark.parametrize('sig', [signal.SIGINT,signal.SIGTERM,signal.SIGHUP])
def test_whoever_watches_stops_the_pod_before_it_goes(sig):
    with Fake(key=KEY) as f:
        made = f.make(dict(name='dfnb-ttl1-x')); it = iter(['500']*2); deaf = [True]
        p = subprocess.Popen([sys.executable,'-c',WATCH,made['id']], cwd=ROOT, env=os.environ|dict(DEEPFAKE_NB_RUNPOD_API=f.url), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        assert p.stdout.readline()=='watching\n'; f.fault = lambda m, path: next(it, None) if m=='POST' else None; f.deaf = lambda id: deaf[0]
        p.send_signal(sig); wait_for(lambda: any(c[1]=='POST' for c in f.calls)); p.send_signal(signal.SIGINT); deaf[0] = False # a second one does not end it
        out = p.communicate(timeout=60)[0]; assert made['end'] and 'EXITED' in out and p.returncode!=0

# --- the first command, by a real bash
ASKED = ('pod stop p1','stop pod p1') # the new spelling, or the old one where the new one failed
def first(tmp_path, hours, git, then='', change=lambda s: s, wait=20):
    "Play the first command of a pod in miniature; what was asked of runpodctl, and after how many seconds"
    bin,home = tmp_path/'bin',tmp_path/'root'; bin.mkdir(); home.mkdir(); log = tmp_path/'ctl'
    for n,s in dict(git=git, runpodctl=f'[ -f {log}.once ] || {{ touch {log}.once; exit 1; }}; echo "$*" >> {log}', curl='exit 1').items(): (bin/n).write_text(f'#!/bin/bash\n{s}\n'); (bin/n).chmod(0o755)
    if then: (home/'deepfake_nb/runpod').mkdir(parents=True); (home/'deepfake_nb/runpod/start.sh').write_text(then)
    argv = start_command(hours, time.time()+hours*3600, REPO, COMMIT); script = change(argv[2].replace('/opt/deepfake_nb', str(home/'deepfake_nb')).replace('sleep 20', 'sleep .1'))
    env = {k:v for k,v in os.environ.items() if not k.startswith(('RUNPOD','DEEPFAKE'))}|dict(PATH=f'{bin}:{os.environ["PATH"]}', RUNPOD_POD_ID='p1', DEEPFAKE_NB_DEADLINE_FILE=str(tmp_path/'armed'), DEEPFAKE_NB_DEADLINE_RETRY='.2', DEEPFAKE_NB_DEADLINE_AGAIN='60')
    start = time.monotonic(); p = subprocess.Popen([*argv[:2],script], env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not log.exists() and time.monotonic()-start<wait: time.sleep(.05)
        return (log.read_text().split('\n')[0] if log.exists() else None),time.monotonic()-start
    finally:
        pids = [int((tmp_path/'armed').read_text().split()[2])] if (tmp_path/'armed').exists() else []
        with contextlib.suppress(psutil.Error): pids += [q.pid for q in psutil.Process(p.pid).children(recursive=True)]
        for q in pids:
            with contextlib.suppress(ProcessLookupError): os.killpg(os.getpgid(q), signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
        p.wait()

def test_the_deadline_holds_while_the_network_hangs(tmp_path):
    asked,s = first(tmp_path, 2/3600, 'exec sleep 600'); assert asked in ASKED and 1.5<s<12 # the first try fails
def test_a_fetch_that_hangs_is_ended_and_the_pod_too(tmp_path):
    asked,s = first(tmp_path, 1, '[ "$1" != init ] || mkdir -p "$3"; [ "$1" != fetch ] || { [ "$GIT_TERMINAL_PROMPT" = 0 ] && exec sleep 600; }', change=lambda s: s.replace('timeout -k 5 60', 'timeout -k 1 .5')); assert asked in ASKED and 2<s<15
def test_a_pod_that_cannot_fetch_its_work_stops_at_once(tmp_path):
    asked,s = first(tmp_path, 1, 'exit 1'); assert asked in ASKED and s<12
def test_a_plan_that_fails_is_no_reason_to_stay(tmp_path):
    asked,s = first(tmp_path, 1, 'exit 0', 'exit 7'); assert asked in ASKED and s<12
def test_and_with_the_wrong_word_it_would_stay(tmp_path):
    asked,s = first(tmp_path, 1, 'exit 0', 'exit 7', lambda s: s.replace('; switch 0', ' && switch 0'), wait=3); assert asked is None
def test_a_clock_that_makes_no_sense_does_not_move_the_deadline(tmp_path):
    asked,s = first(tmp_path, 2/3600, 'exec sleep 600', change=lambda s: re.sub(r'left=\$\(\( \d+ -', 'left=$(( 99999999999 -', s)); assert asked in ASKED and s<12

# --- results
def shipped(folder, files, pod='pod001', final=True, code=0):
    for n,b in files.items(): q = folder/n; q.parent.mkdir(parents=True, exist_ok=True); q.write_bytes(b)
    (folder/'shipped.json').write_text(json.dumps(dict(files={n:dict(bytes=len(b), sha256=hashlib.sha256(b).hexdigest()) for n,b in files.items()}, made='', pod=pod, final=final, code=code)))

def test_what_guard_ships_is_what_pull_proves(tmp_path):
    (tmp_path/'home/results').mkdir(parents=True); (tmp_path/'home/results/a.json').write_text('{}'); to = f'memory://shipped-{os.getpid()}'; guard.ship(tmp_path/'home', to, pod='pod001')
    got = pull(to, tmp_path/'here'); assert got['fetched']==1
    with pytest.raises(PodError, match='in the middle'): proved(tmp_path/'here', 'pod001')
    guard.run_and_stop(['true'], tmp_path/'home', to, plan=lambda *a, **k: 3, stop=lambda: None, say=lambda s: None); m = pull(to, tmp_path/'here'); assert (m['final'],m['code'])==(True,3)
    assert proved(tmp_path/'here', m['pod'])['code']==3

def test_a_pull_that_is_killed_goes_on(tmp_path):
    big = os.urandom(80<<20); shipped(tmp_path/'v', dict(big=big, small=b'x'))
    p = subprocess.Popen([sys.executable,'-c','import sys; from deepfake_nb.pod import pull; pull(*sys.argv[1:])',tmp_path/'v',tmp_path/'h'], cwd=ROOT); part = tmp_path/'h/big.part'
    wait_for(lambda: part.exists() and part.stat().st_size or p.poll() is not None); p.kill(); p.wait()
    assert pull(tmp_path/'v', tmp_path/'h')['fetched']>=1 and (tmp_path/'h/big').read_bytes()==big; proved(tmp_path/'h', 'pod001')

def test_removed_only_with_proof(tmp_path, capsys):
    shipped(tmp_path/'v', dict(a=b'1'), 'pod001'); shipped(tmp_path/'old', dict(a=b'1'), 'pod000'); pull(tmp_path/'v', tmp_path/'h'); pull(tmp_path/'old', tmp_path/'ho')
    with Fake(key=KEY) as f:
        f.make(dict(name='dfnb-ttl1-x')); stop = lambda *a: pod_main(['stop','pod001','--api',f.url,'--terminate',*map(str, a)]); alive = lambda: f.pods['pod001']['status']
        assert stop()==2 and stop('--results', tmp_path/'v2')==1 and stop('--results', tmp_path/'ho')==1 and alive()=='RUNNING'
        (tmp_path/'h/a').write_bytes(b'2'); assert stop('--results', tmp_path/'h')==1 and alive()=='RUNNING'
        assert pull(tmp_path/'v', tmp_path/'h')['fetched']==1 and stop('--results', tmp_path/'h')==0 and alive()=='TERMINATED'

# --- the key: planted, then searched for in all that was written
def test_the_key_is_nowhere(tmp_path):
    seen,out,stop = [],[],threading.Event(); env = dict(DEEPFAKE_NB_HOME=str(tmp_path/'home'), HOME=str(tmp_path)); mine = psutil.Process()
    def lines():
        while not stop.is_set():
            for p in [mine,*mine.children(recursive=True)]:
                with contextlib.suppress(psutil.Error): seen.append(' '.join(p.cmdline()))
            time.sleep(.02)
    t = threading.Thread(target=lines); t.start(); keyfile = tmp_path/'secret-key'; keyfile.write_text(KEY); keyfile.chmod(0o600)
    try:
        for fault in ('echo','hang','500+','half','garbage',None):
            n = iter([fault]*3)
            with Fake(key=KEY, fault=lambda m, p: next(n, None)) as f:
                f.make(dict(name='dfnb-ttl1-x'), createdAt=f.now()-7200)
                for a in (['list'],['sweep'],['stop','pod001'],[*LAUNCH,'--volume','vol1','--yes','--detach']): out.append(here(f, *a)[1])
                out.append(here(f, 'list', key=Key(keyfile))[1])
        with Fake(key=KEY, fault=lambda m, p: 'hang') as f: r = cli('sweep', '--api', f.url, '--patience', '2', env=env); out.append(r.stdout+r.stderr); assert r.returncode==1
        r = cli('list','--api','http://127.0.0.1:9/v2','--key-file',tmp_path/'none', env=env); out.append(r.stderr); assert r.returncode==1 and 'cannot be read' in r.stderr
        code = 'from deepfake_nb.pod import *\nRunPod(url="http://127.0.0.1:9/v2").ask("GET", "/pods")'; r = subprocess.run([sys.executable,'-X','dev','-c',code], cwd=ROOT, env=os.environ|env, capture_output=True, text=True); out.append(r.stderr); assert 'Unsure' in r.stderr # a whole traceback
    finally: stop.set(); t.join()
    keyfile.unlink(); written = [p for p in tmp_path.rglob('*') if p.is_file()]
    assert any('pod_main' in s for s in seen) and any('$RUNPOD_API_KEY' in o for o in out) and len(out)>30
    for text in (*out, *seen, *(p.read_bytes().decode('latin1') for p in written)): assert KEY not in text and KEY[4:] not in text
