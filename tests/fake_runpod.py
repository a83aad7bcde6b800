"""RunPod's REST API v2 on 127.0.0.1, in virtual time, billing pods and misbehaving when told to; and a world in which the layers that stop a pod live"""
from contextlib import suppress
import heapq,itertools,json,math,os,random,signal,subprocess,threading,time
from datetime import datetime,timezone
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler,ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs,urlsplit
import requests

class Over(BaseException): "The world ended while somebody slept"

class Clock:
    "Virtual time: it moves when everybody who lives in it sleeps, and wakes one after the other"
    def __init__(self, start=1_800_000_000.):
        self.t,self.awake,self.beds,self.over,self.n,self.cv = start,0,[],False,itertools.count(),threading.Condition(threading.RLock())
        self.dead = set() # threads that were killed
    def now(self): return self.t
    def enter(self):
        with self.cv: self.awake += 1
    def leave(self):
        with self.cv: self.awake -= 1; self._turn()
    def at(self, t, f):
        "Call `f()` when it is `t`"
        with self.cv: heapq.heappush(self.beds, (max(t, self.t), next(self.n), f))
    def sleep(self, s):
        if threading.current_thread() in self.dead: s = math.inf
        bed = []
        with self.cv:
            if self.over: raise Over
            heapq.heappush(self.beds, (self.t+max(0, s), next(self.n), bed))
            self.awake -= 1; self._turn()
            while not bed: self.cv.wait()
        if self.over: raise Over
        if threading.current_thread() in self.dead: self.sleep(math.inf) # killed in its sleep
    def _turn(self):
        while self.beds and (self.over or not self.awake):
            t,_,what = heapq.heappop(self.beds)
            if t<math.inf: self.t = max(self.t, t) if not self.over else self.t
            if callable(what): self.over or what()
            else: what.append(1); self.awake += 1; self.cv.notify_all()
    def end(self):
        with self.cv: self.over = True; self._turn()

def iso(t): return None if t is None else datetime.fromtimestamp(t, timezone.utc).isoformat().replace('+00:00', 'Z')

ODD = [[], {}, 5, 'x', None, dict(pods=None), dict(pods={}), dict(pods=[1]), dict(pods=[None], pagination=[]), dict(pods=[], pagination=[1])] # answers that are JSON, and none
BENT = [dict(mounts=[1]), dict(mounts=dict(network=dict(volumeId='v'))), dict(mounts='x'), dict(ssh='x'), dict(gpu=[1]), dict(cost='free'), dict(cost=None), dict(createdAt=5), dict(status=None), dict(status=[]), dict(id=None), dict(args={})] # what a pod may say of itself

FAULTS = 'hang late down 500 500+ half half- 429 garbage'.split() # what any call may meet; `+`: it was done all the same, `half-`: it was not

class Fake:
    "The provider. `fault(method, path)` names what goes wrong with a call; `price`, `deaf`, `slow`, `boot`, `skew`, `sees` bend the rest"
    def __init__(self, clock=None, key='key-of-the-test', fault=None, price=.39, offer=.39):
        self.clock,self.key,self.fault,self.price,self.offer = clock,key,fault or (lambda m, p: None),price,offer
        self.now = clock.now if clock else time.time
        self.pods,self.calls,self.old,self.lock,self.closed,self.turn = {},[],None,threading.RLock(),False,0
        self.deaf,self.slow,self.boot,self.skew,self.page,self.stopped,self.booted = (lambda id: False),0,0,0,1000,(lambda id: None),(lambda id: None)
        self.volumes = {'vol1':dict(id='vol1', name='faces', size=60, dataCenter='EU-RO-1', type='STANDARD')}
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('H', (Handler,), dict(fake=self))); self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}/v2'
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
    def close(self): self.closed = True; self.server.shutdown(); self.server.server_close()
    def __enter__(self): return self
    def __exit__(self, *a): self.close()
    # --- what is true
    def make(self, body, **kw):
        id = f'pod{len(self.pods)+1:03}'
        self.pods[id] = dict(body, id=id, status='RUNNING', createdAt=self.now(), startedAt=self.now(), end=None, cost=self.price, gpu=dict(body.get('gpu', dict(id='none')), vcpuCount=8, memory=32))|kw
        self.pods[id]['born'] = self.pods[id]['createdAt'] or self.now()
        if self.boot: self.pods[id].update(status='PROVISIONING', startedAt=None); self.clock.at(self.now()+self.boot, lambda: self._boot(id))
        else: self.booted(id)
        return self.pods[id]
    def _boot(self, id):
        if self.pods[id]['end'] is None: self.pods[id].update(status='RUNNING', startedAt=self.now()); self.booted(id)
    def stop(self, id, status='EXITED'):
        p = self.pods[id]
        if p['end'] is None: p['end'] = self.now(); self.stopped(id)
        if p['status']!='TERMINATED': p['status'] = status
    def billed(self, id): return (self.pods[id]['end'] or self.now())-self.pods[id]['born']
    # --- what is said
    def shown(self, p):
        e,c = p.get('entrypoint', []),p.get('cmd', [])
        return dict({k:v for k,v in p.items() if k!='bend'}, createdAt=iso(p['createdAt']), startedAt=iso(p['startedAt']), end=None, born=None, cost=0. if p['end'] else p['cost'], dataCenterId=(p.get('dataCenterIds') or ['EU-RO-1'])[0],
                    args=json.dumps(dict(entrypoint=e, cmd=c)), ssh=dict(proxy=None, direct=dict(host='203.0.113.7', port=22001, username='root', command='ssh root@203.0.113.7 -p 22001') if '22/tcp' in p.get('ports', []) and p['status']=='RUNNING' else None))|p.get('bend', {})
    def odd(self, data):
        "The same answer, out of shape: all of it, or one field of each pod"
        self.turn += 1; bend = lambda d: d|BENT[self.turn%len(BENT)] if isinstance(d, dict) and 'id' in d else d
        if self.turn%3==0: return ODD[self.turn//3%len(ODD)]
        return data|dict(pods=[bend(d) for d in data['pods']]) if isinstance(data, dict) and 'pods' in data else bend(data)
    def listing(self): return [self.shown(p) for p in self.pods.values() if p['status']!='TERMINATED']
    def answer(self, method, path, query, body):
        "Status and data, after doing it"
        parts = path.strip('/').split('/')[1:]
        if parts==['pods'] and method=='GET':
            i = int(query.get('cursor', ['0'])[0]); got = self.listing(); rest = i+self.page<len(got)
            return 200,dict(pods=got[i:i+self.page], pagination=dict(hasNextPage=rest, nextCursor=str(i+self.page) if rest else None))
        if parts==['pods']: return 201,self.shown(self.make(body))
        if parts[0]=='pods':
            p = self.pods.get(parts[1])
            if p is None or p['status']=='TERMINATED': return 404,dict(title='Not Found', status=404, detail='pod not found')
            if method=='DELETE' or body and body.get('action')=='terminate': self.stop(p['id'], 'TERMINATED'); return 204,None
            if method=='POST' and body['action']=='stop' and not self.deaf(p['id']):
                if self.slow: self.clock.at(self.now()+self.slow, lambda: self.stop(p['id']))
                else: self.stop(p['id'])
            return 200,self.shown(p)
        if parts[0]=='catalog': return 200,dict(gpus=[dict(id='NVIDIA GeForce RTX 4090', price=dict(secure=self.offer, community=self.offer)), dict(id='NVIDIA H100 PCIe', price=dict(secure=2.89, community=None))])
        if parts[0]=='network-volumes' and parts[1] in self.volumes: return 200,self.volumes[parts[1]]
        return 404,dict(title='Not Found', status=404, detail='no such thing')

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *a): pass
    def say(self, status, data, extra=(), tear=False):
        text = b'' if data is None else data if isinstance(data, bytes) else json.dumps(data).encode()
        head = [f'HTTP/1.1 {status} X', f'Date: {formatdate(self.fake.now()+self.fake.skew, usegmt=True)}', f'Content-Length: {len(text)}', 'Content-Type: application/json', 'Connection: close', *extra]
        self.close_connection = True
        try: self.wfile.write('\r\n'.join(head).encode()+b'\r\n\r\n'+(text[:len(text)//2] if tear else text))
        except OSError: pass # who asked is gone
    def do(self):
        f,n = self.fake,int(self.headers.get('Content-Length') or 0); body = json.loads(self.rfile.read(n)) if n else None
        url = urlsplit(self.path); method,path,query = self.command,url.path,parse_qs(url.query)
        if path=='/sim/sleep': # the `sleep` of a shell that lives in virtual time
            try: f.world.nap(query['pod'][0], float(query['s'][0]))
            except Over: self.close_connection = True; return
            return self.say(200, None)
        if path=='/sim/now': return self.say(200, f'{round(f.now())}\n'.encode())
        with f.lock:
            if f.closed: self.close_connection = True; return
            if self.headers.get('Authorization')!=f'Bearer {f.key}': return self.say(401, dict(title='Unauthorized', status=401, detail='invalid token'))
            fault = f.fault(method, path); f.calls.append((f.now(), method, path, fault, body))
            if fault=='echo': return self.say(500, dict(title='Oops', detail=f'your header was {self.headers["Authorization"]}'))
            if fault=='down': self.close_connection = True; return
            if fault=='drip': # real time: a byte now and then
                self.wfile.write(b'HTTP/1.1 200 X\r\nContent-Length: 100000\r\n\r\n')
                try:
                    while True: self.wfile.write(b' '); time.sleep(.05)
                except OSError: self.close_connection = True; return
            if fault in ('hang','late'):
                if fault=='late': f.clock.at(f.now()+25, lambda: f.answer(method, path, query, body)) if f.clock else f.answer(method, path, query, body)
                if not f.clock: time.sleep(3)
                return self.say(599, None, ['X-Sim: hang'])
            if fault=='500': return self.say(500, dict(title='Internal Server Error', status=500, detail='try again'))
            if fault=='429': return self.say(429, dict(title='Too Many Requests', status=429, detail='slow down'), ['Retry-After: 12'])
            if fault=='garbage': return self.say(200, b'<html>maintenance</html>')
            if fault in ('stale','empty') and method=='GET' and path=='/v2/pods': return self.say(200, dict(pods=(f.old or []) if fault=='stale' else []))
            if fault=='half-': return self.say(200, dict(pods=[], id='x', name='x', status='EXITED'), tear=True)
            status,data = f.answer(method, path, query, body)
            if path=='/v2/pods' and method=='GET': f.old = data.get('pods')
            if fault=='500+': return self.say(500, dict(title='Internal Server Error', status=500, detail='after it was done'))
            if fault=='odd': data = self.fake.odd(data)
            self.say(status, data, [f'Location: {f.url}/elsewhere'] if status==307 else [], tear=fault=='half')
    do_GET = do_POST = do_DELETE = do

# --- the world
HELLO = 'exec 3<>/dev/tcp/127.0.0.1/$SIM_PORT || exit 1\n'
SLEEP = '#!/bin/bash\n'+HELLO.replace('exit 1', '{ kill -9 $PPID; exit 1; } # the world has ended: a switch that is deaf to all else would spin for ever')+'printf "POST /sim/sleep?s=$1&pod=$RUNPOD_POD_ID HTTP/1.1\\r\\n\\r\\n" >&3; read -r line <&3; [ -n "$line" ]\n'
CTL = ('#!/bin/bash\n# runpodctl: only the new spelling\n[ "$1 $2" = "pod stop" ] || exit 1\nbody=\'{"action":"stop"}\'\n'+HELLO+
       'printf "POST /v2/pods/$3/action HTTP/1.1\\r\\nAuthorization: Bearer $SIM_KEY\\r\\nContent-Length: ${#body}\\r\\n\\r\\n$body" >&3\n'
       'read -r _ status _ <&3; case "$status" in 2*) exit 0;; esac; exit 1\n')
UP = 'up() { local l; exec 3<>/dev/tcp/127.0.0.1/$SIM_PORT; printf "POST /sim/now HTTP/1.1\\r\\n\\r\\n" >&3; while read -r l <&3 && [ "$l" != $\'\\r\' ]; do :; done; read -r l <&3; echo "$l"; }' # the clock of this world instead of /proc/uptime
SWITCH = Path(__file__).resolve().parents[1]/'runpod'/'deadline.sh'

def patient(send, clock):
    "The transport `send`, where waiting for an answer that never comes costs virtual seconds"
    def f(*a, seconds, **kw):
        status,head,text = send(*a, seconds=10, **kw)
        if head.get('X-Sim')=='hang': clock.sleep(seconds); raise requests.Timeout('no answer in time')
        return status,head,text
    return f

class World:
    "A provider, its time, and the layers that are alive; `run` plays until all pods are stopped, or `hours` are over"
    def __init__(self, folder, seed=0, **kw):
        self.clock = Clock(); self.fake = Fake(self.clock, **kw); self.folder,self.rng,self.shells,self.threads,self.errors = Path(folder),random.Random(seed),{},[],[]
        self.fake.stopped,self.fake.world,self.expected = self.power_off,self,KeyboardInterrupt
        self.clock.enter() # time stands still until `run`
    def client(self, RunPod, send, **kw):
        "A client of class `RunPod` that lives in this time"
        return RunPod(url=self.fake.url, now=self.clock.now, sleep=self.clock.sleep, send=patient(send, self.clock), **kw)
    def live(self, f, *a, at=0, pod=None):
        "A thread in this world: calls `f(*a)` after `at` seconds; with `pod`: it lives on that pod, and dies with it"
        self.clock.enter()
        def go():
            try: self.clock.sleep(at); f(*a)
            except Over: pass
            except BaseException as e: self.errors.append(e)
            finally: self.clock.leave()
        t = threading.Thread(target=go, daemon=True); t.pod = pod; self.threads.append(t); t.start(); return t
    def kill(self, t):
        "SIGKILL for a thread, at its next sleep: it never wakes again, and cleans nothing up"
        self.clock.dead.add(t)
    def shell(self, script, pod):
        "A real bash as a process of the pod: `sleep`, `runpodctl` and the clock are those of this world"
        bin = self.folder/'bin'
        if not bin.exists():
            bin.mkdir(parents=True)
            for n,s in (('sleep',SLEEP),('runpodctl',CTL)): (bin/n).write_text(s); (bin/n).chmod(0o755)
        env = dict(PATH=f'{bin}:/usr/bin:/bin', RUNPOD_POD_ID=pod, SIM_PORT=str(self.fake.server.server_port), SIM_KEY=self.fake.key, DEEPFAKE_NB_POD_ENVIRON='/dev/null')
        self.clock.enter()
        p = self.shells[pod] = subprocess.Popen(['bash','-c',f'{SWITCH.read_text()}\n{UP}\n{script}'], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        p.sleeping = p.dead = False
        def wait():
            p.wait()
            with self.clock.cv:
                if not p.dead: p.dead = True; self.clock.leave()
        threading.Thread(target=wait, daemon=True).start(); return p
    def power_off(self, pod):
        "A pod that is stopped has no processes"
        for t in self.threads:
            if t.pod==pod: self.kill(t)
        if pod in self.shells: self.end_shell(pod)
    def end_shell(self, pod):
        p = self.shells[pod]
        with self.clock.cv:
            if p.dead: return
            p.dead = True
            with suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
            if not p.sleeping: self.clock.leave()
    def nap(self, pod, s):
        "A shell's sleep"
        p = self.shells.get(pod)
        with self.clock.cv:
            if p is None or p.dead: return
            p.sleeping = True
        self.clock.sleep(s)
        with self.clock.cv:
            p.sleeping = False
            if p.dead: self.clock.leave()
    def run(self, hours):
        "Play; seconds that were billed, by pod"
        begin = self.clock.t; self.clock.at(begin+hours*3600, self.clock.end); self.clock.leave(); quiet = None
        while any(t.is_alive() and t not in self.clock.dead for t in self.threads) or any(not p.dead for p in self.shells.values()):
            if self.clock.over: break
            over = self.fake.pods and all(p['end'] is not None for p in self.fake.pods.values()) and not any(t.is_alive() and t.name=='must' for t in self.threads)
            quiet = None if not over else quiet or self.clock.t
            if quiet and self.clock.t>quiet+180: break # nobody makes another one
            time.sleep(.001)
        bills = {id:self.fake.billed(id) for id in self.fake.pods}
        self.clock.end(); self.fake.close()
        for p in self.shells.values():
            with suppress(ProcessLookupError): # it may just have ended with its world
                if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
        for t in self.threads:
            if t not in self.clock.dead: t.join(5)
        if bad := [e for e in self.errors if not isinstance(e, self.expected)]: raise bad[0]
        return bills
    code = None # name -> class or function of chapter 53; default those of the package
    def _code(self, *names):
        import deepfake_nb.pod
        return [(self.code or vars(deepfake_nb.pod))[n] for n in names]
    # --- the four layers; each is the code that people run
    def layer(self, name, pod, api, end, **kw):
        "Bring one to life: for the pod of that id, with its deadline at `end`"
        left = max(0, round(end-self.clock.t))
        if name=='deadline': return self.shell(kw.get('script', 'switch %d') % left, pod)
        return self.live(getattr(self, f'_{name}'), pod, api, end, kw, pod=pod if name in ('idle','pod_runner') else None)
    def _runner(self, pod, api, end, kw):
        Pod,watched = self._code('Pod', 'watched')
        with watched(api, Pod(pod, '', 'RUNNING'), end, kw.get('bring')):
            if kw.get('ends') and self.clock.t+kw['ends']<end: self.clock.sleep(kw['ends']); raise kw.get('how', KeyboardInterrupt)()
            api.follow(pod, end)
    def _sweep(self, pod, api, end, kw):
        PodError, = self._code('PodError')
        while True:
            try: kw.get('sweep', lambda api: api.sweep())(api)
            except PodError: pass # exit 1, and a mail from cron
            self.clock.sleep(60-self.clock.t%60) # cron: every full minute
    def _ways(self, pod):
        from deepfake_nb.guard import ask_rest
        return {'REST':lambda: ask_rest('stop', pod, self.fake.key, self.fake.url)}
    def _end(self, pod): # as `guard` does by default
        from deepfake_nb.guard import end_pod,stop_self
        end_pod(lambda all: stop_self(self._ways(pod), all, sleep=self.clock.sleep, say=lambda s: None), sleep=self.clock.sleep)
    def _idle(self, pod, api, end, kw):
        from deepfake_nb.guard import watch
        busy = kw.get('ends', 0)+self.clock.t
        watch('.', minutes=kw.get('minutes', 10), every=30, gpu=lambda: 90. if self.clock.t<busy else 0., renewed=lambda: False, kernels=lambda: 0, stop=kw.get('stop') or (lambda: self._end(pod)), sleep=self.clock.sleep, now=self.clock.now, say=lambda s: None)
    def _pod_runner(self, pod, api, end, kw):
        from deepfake_nb.guard import run_and_stop
        def plan(argv, limit, grace, keep, say): self.clock.sleep(limit); return kw.get('code', 0)
        def ship(*a, **k):
            if kw.get('unshipped'): raise OSError('the volume is full')
            return dict(files={})
        run_and_stop([], self.folder/pod, '', limit=max(1, kw.get('ends') or end-self.clock.t-60), plan=plan, ship=ship, stop=kw.get('stop') or (lambda: self._end(pod)), say=lambda s: None)
