"""The crash laboratory: the stages of a tiny plan are killed again and again until the plan is done, and then it must be the plan that nobody disturbed.

`.venv/bin/python tests/laboratory.py --kills 200 --seed 0` prints a table and writes records/crashes.json. Everything a stage needs is imported once;
each attempt is a fork that runs the code cells of the real stage notebook in a real IPython shell, in a process group of its own, and dies by SIGKILL with all its workers."""
import os
for n in ('OMP_NUM_THREADS','MKL_NUM_THREADS'): os.environ.setdefault(n, '1') # what has threads cannot be forked, and a sum must not depend on their number
import argparse,faulthandler,json,math,random,re,select,shutil,signal,sys,tempfile,time,traceback
from collections import Counter
from dataclasses import dataclass,field,replace
from pathlib import Path
import cv2,nbformat,torch
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config
from deepfake_nb.checkpoints import latest
from deepfake_nb.journal import METRICS_MIME,read_rows
from deepfake_nb.pack import home,read_json,sample,sha256,write_json
from deepfake_nb.executors import notebook
from deepfake_nb.runs import declared
from deepfake_nb.video import VideoFile,write_video

torch.set_num_threads(1); cv2.setNumThreads(0)
signal.signal(signal.SIGUSR2, signal.SIG_IGN) # asks a fork where it stands, as soon as it can tell
ROOT = Path(__file__).resolve().parent.parent
PLAN = (('prepare',{}), ('phase_a',{}), ('evaluate',{}), ('phase_b',{}), ('evaluate',dict(phase='b')))
OURS = {'resumed','spent','reused','name'} # what may differ in an ending: where it went on, and what that cost

# ---- one attempt: a fork that runs the cells of a stage

@dataclass
class Attempt:
    "How one start of a stage ended"
    stage:str
    killed:bool # by us
    seconds:float
    how:str='' # it was to be killed: at a moment, a file operation, a row of the journal
    metrics:dict=None # of a good end
    error:str='' # of a bad one
    ops:list=field(default_factory=list) # file operations of a good end: (what, file)
    stack:list=field(default_factory=list) # (module, function) at the kill, innermost first
    run:Path=None # its folder

def cells(stage):
    "The parameters of a stage's notebook and the code of its other cells, as they are now"
    code = [c for c in nbformat.read(notebook(stage), 4).cells if c.cell_type=='code' and c.source.strip()]
    head, = [c.source for c in code if 'parameters' in c.metadata.get('tags', [])]
    return head,[c.source for c in code if c.source!=head]

IMPORTS = re.compile(r'(#|from\s|import\s|\s|$)')
def warm():
    "Import here what the stages import, so that a fork begins at once"
    for stage in {s for s,_ in PLAN}:
        for c in cells(stage)[1]:
            if all(map(IMPORTS.match, c.splitlines())): exec(c, {})
    import torch._dynamo,IPython.core.oinspect,matplotlib_inline.backend_inline,PIL.Image,PIL.JpegImagePlugin # what they import late
    PIL.Image.init()
    assert len(os.listdir('/proc/self/task'))==1, 'this process has threads, and must not be forked'

def at_operations(die_at, torn, out):
    "Note the file operations of this process; at number n of those on files named like `die_at=(n, pattern)` it is killed, before it or in the middle of writing"
    ops,last,left = [],[''],[die_at[0] if die_at else 0]
    def wrap(name, f):
        def g(*a, **kw):
            last[0] = next((Path(x).name for x in a if isinstance(x, (str,Path))), last[0]); ops.append((name, last[0]))
            left[0] -= bool(die_at and re.search(die_at[1], last[0]))
            if die_at and left[0]==0:
                if torn and name.startswith('write'): f(a[0], a[1][:len(a[1])//2], *a[2:], **kw)
                faulthandler.dump_traceback(out); os.kill(os.getpid(), signal.SIGKILL)
            return f(*a, **kw)
        return g
    for n in ('replace','fsync','open','link'): setattr(os, n, wrap(n, getattr(os, n)))
    for n in ('unlink','touch','mkdir','write_bytes','write_text'): setattr(Path, n, wrap(n, getattr(Path, n)))
    return ops

class Shell(InteractiveShell):
    "An IPython shell as a kernel has one: figures inline, what is displayed is caught"
    def enable_gui(self, gui=None): pass

def shell():
    c = Config(); c.HistoryManager.enabled = False
    ip = Shell.instance(config=c, display_pub_class=CapturingDisplayPublisher)
    ip.enable_matplotlib('inline')
    return ip

def live(stage, sources, given, out, log, before, die_at, torn):
    "The life of a fork: prints to `log`, tells its end to `out`"
    null = os.open(os.devnull, os.O_RDONLY)
    for a,b in ((null,0),(log,1),(log,2)): os.dup2(a, b)
    sys.stdin,sys.stdout,sys.stderr = (open(i, m, buffering=b, closefd=False) for i,m,b in ((0,'r',-1),(1,'w',1),(2,'w',1)))
    faulthandler.register(signal.SIGUSR2, out)
    head,rest = sources; ip = shell()
    if before: before()
    ops = at_operations(die_at, torn, out)
    for source in (head, '\n'.join(f'{k} = {v!r}' for k,v in given.items()), *rest):
        r = ip.run_cell(source)
        if e := r.error_before_exec or r.error_in_exec: return dict(error=f'{type(e).__name__}: {e}')
    got, = [o['data'][METRICS_MIME] for o in ip.display_pub.outputs if METRICS_MIME in o['data']]
    return dict(metrics=got, ops=ops)

def environment(home): return dict(DEEPFAKE_NB_HOME=str(home), CUDA_VISIBLE_DEVICES='') # no fork can use a card, and only a CPU gives the same bits each time

def attempt(stage, given, home, run, delay=None, die_at=None, torn=False, before=None, sources=None, watch=None, limit=300):
    "Start a stage and kill it after `delay` seconds, or at a file operation, or let it end; `watch(pid)` -> True kills it too"
    run = Path(run); run.mkdir(parents=True)
    r,w = os.pipe(); start = time.monotonic()
    log = os.open(run/'log.txt', os.O_CREAT|os.O_WRONLY)
    sys.stdout.flush(); sys.stderr.flush()
    if not (pid := os.fork()):
        os.close(r); os.setpgid(0, 0); code = 1
        try:
            os.environ.update(environment(home), DEEPFAKE_NB_RUN=str(run))
            end = json.dumps(live(stage, sources or cells(stage), given, w, log, before, die_at, torn)).encode()
            while end: end = end[os.write(w, end):]
            code = 0
        except BaseException: os.write(2, traceback.format_exc().encode())
        finally: os._exit(code)
    os.close(w); os.close(log); group(pid)
    try: said = listen(r, pid, start, delay, watch, limit)
    finally: os.close(r); code = finish(pid)
    killed = code==-signal.SIGKILL; how = 'file operation' if die_at else 'row of the journal' if watch else 'moment'
    res = Attempt(stage, killed, time.monotonic()-start, how, run=run)
    if killed: res.stack = frames(said); return res
    if code: raise AssertionError(f'{stage}: the laboratory itself failed ({code}): {(run/"log.txt").read_text()[-2000:]}')
    for k,v in json.loads(said).items(): setattr(res, k, v)
    return res

def listen(r, pid, start, delay, watch, limit):
    "What the fork says until its end; at the moment of the kill, where it stands"
    said = b''
    def more(seconds):
        nonlocal said
        if not select.select([r], [], [], max(0, seconds))[0]: return None
        said += (new := os.read(r, 1<<20)); return bool(new)
    end = start+(limit if delay is None else delay)
    while (now := time.monotonic())<end:
        if (got := more(min(end-now, .01 if watch else 60))) is False: return said.decode()
        if got is None and watch and watch(pid): break
    else:
        if delay is None: os.killpg(pid, signal.SIGKILL); raise AssertionError(f'it hangs: more than {limit} s')
    os.kill(pid, signal.SIGUSR2); end = time.monotonic()+1
    while not any(w in said for w in (b' in live', b'  ...')) and time.monotonic()<end and more(.2) is not False: pass
    os.killpg(pid, signal.SIGKILL)
    while more(5): pass
    return said.decode()

def group(pid):
    "A process group of its own for the fork and its workers; the fork does the same, whoever comes first"
    try: os.setpgid(pid, pid)
    except (ProcessLookupError,PermissionError): pass

def finish(pid):
    "Reap the fork, then end all that it started: its exit code"
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try: os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError: pass
    return code

def frames(text):
    "(module, function) of the thread that runs the cells, innermost first"
    threads = re.split(r'(?m)^(?:Current thread|Thread) .*$', text)
    return [(Path(f).stem, n) for t in threads if any(w in t for w in (' in live', '  ...')) for f,n in re.findall(r'File "(.*?)", line \d+ in (\S+)', t)]

# ---- a plan in a room of its own

FILMS = (('ann','woman',0), ('dora','woman',32), ('eve','woman',64), ('carl','man',0), ('bob','carphone',0)) # who, cut from which sample, from which frame: five people, so that weights are chosen

def make_films(folder, n=24):
    for who,name,first in FILMS: (folder/who).mkdir(parents=True); write_video(folder/who/'film.mp4', VideoFile(sample(name)).read(first, n)[0], rate=24)

def in_a_fork(f):
    "Decoders have threads, and a fork after them may hang: what needs them is done elsewhere"
    if not (pid := os.fork()):
        try: f(); os._exit(0)
        except BaseException: traceback.print_exc()
        finally: os._exit(1)
    assert os.waitpid(pid, 0)[1]==0

@dataclass
class Room:
    "One plan: its home, and all that was tried in it"
    folder:Path
    attempts:list=field(default_factory=list)
    ends:list=field(default_factory=list) # the last attempt of each stage of the plan
    home = property(lambda self: self.folder/'home')
    kills = property(lambda self: [a for a in self.attempts if a.killed])

class Laboratory:
    "Films, the cells of the stages as they are now, and the plan that nobody disturbs"
    def __init__(self, root, plan=PLAN, say=lambda s: None, **given):
        self.root,self.plan,self.say,self.sources = Path(root).resolve(),plan,say,{s:cells(s) for s,_ in plan}
        self.names = {s:set(declared(notebook(s))) for s in self.sources}
        in_a_fork(lambda: make_films(self.root/'films'))
        warm()
        self.given = dict(preset='tiny', videos=str(self.root/'films'), seed=6, pairs=2, steps=6, steps_b=4, save_minutes=1e-9)|given # an epoch is four batches; a checkpoint after each step; with this seed the best weights are neither the first nor the last
        self.whole = self.run('whole')

    def room(self, name):
        r = Room(self.root/name); r.home.mkdir(parents=True, exist_ok=True); (r.home/'pack').symlink_to(home()/'pack', target_is_directory=True)
        return r

    def after(self, name, n):
        "A room in which the first `n` stages have ended as in the undisturbed plan, copied from there"
        r = self.room(name); here = lambda x: json.loads(json.dumps(x).replace(str(self.whole.home), str(r.home)))
        for part in ('store','checkpoints')[:n]: shutil.copytree(self.whole.home/part, r.home/part)
        r.ends = [replace(a, metrics=here(a.metrics)) for a in self.whole.ends[:n]]
        r.attempts = r.ends[:]
        return r

    def parameters(self, i, ends):
        "What stage `i` of the plan is given, after those before it have ended so"
        stage,fixed = self.plan[i]; told = dict(store=ends[0].metrics['store']) if ends else {}
        if i>2: told |= dict(gate=ends[2].metrics['gate'] if stage=='phase_b' else '', rehearsal=ends[2].metrics['gate']!='phase_b')
        return {k:v for k,v in (self.given|fixed|told).items() if k in self.names[stage]}

    def next_run(self, room, i): return room.folder/'runs'/f'{len(room.attempts):03d}-{self.plan[i][0]}'

    def start(self, room, i, more={}, **kill):
        "One attempt at stage `i`"
        stage = self.plan[i][0]
        a = attempt(stage, self.parameters(i, room.ends)|more, room.home, self.next_run(room, i), sources=self.sources[stage], **kill)
        room.attempts.append(a); return a

    def run(self, name, kill=lambda room, i, tries: {}, room=None, upto=None, more={}):
        "The stages in order, each started again as long as it is killed; `kill` says how, {} lets it be"
        room = room or self.room(name)
        for i in range(len(room.ends), len(self.plan) if upto is None else upto):
            tries = 0
            while (a := self.start(room, i, {k:v for k,v in more.items() if k in self.names[self.plan[i][0]]}, **kill(room, i, tries))).killed: tries += 1
            if a.error: raise AssertionError(f'{name}: {a.stage} after {tries} kills: {a.error}\n'+(a.run/'log.txt').read_text()[-3000:])
            room.ends.append(a)
        return room

# ---- is it the same plan?

def words(a, room):
    "What a stage said at its end, without what may differ and without the place of its room"
    return {k:v.replace(str(room.home), '') if isinstance(v, str) else v for k,v in a.metrics.items() if k not in OURS}

def steps(room, stages):
    "(stage, step) -> the different rows that any attempt noted for it, without their times; and (stage, step, 'evaluation')"
    rows = {}
    for a in room.attempts:
        for k,v in steps_of(a).items() if a.stage in stages else (): rows.setdefault(k, set()).add(v)
    return rows

def steps_of(a):
    rows = [r for r in read_rows(a.run) if 'step' in r and 'said' not in r] if (a.run/'metrics.jsonl').exists() else []
    return {(a.stage, r['step'], 'evaluation' if 'evaluation' in r else 'step'):json.dumps({k:v for k,v in r.items() if k!='time'}, sort_keys=True) for r in rows}

def files(room, stages):
    "name -> sha256 of what the stages leave for each other: shards and what lies beside them, named weights, and the newest checkpoint of each folder"
    store,kept = room.home/'store',room.home/'checkpoints'
    res = {str(p.relative_to(room.home)):sha256(p) for p in store.rglob('[!.]*') if p.suffix in ('.zip','.json','.jsonl')}
    res |= {str(p.relative_to(room.home)):str(sorted(f['sha256'] for f in read_json(p)['files'].values())) for p in kept.rglob('*_best.json')}
    for f in {p.parent for p in kept.rglob('[0-9]*-step*.json')}: found = latest(f); res[f'{f.relative_to(room.home)}: newest'] = f'step {found.step} {sha256(found.weights)}'
    return {k:v for k,v in res.items() if stages>3 or '/phase_b-' not in k and (stages>1 or 'checkpoints' not in k)}

def differences(a, b):
    "What differs between two plans that have ended; [] if they are one and the same"
    n = len(b.ends) # the second may have stopped before the first
    both = [({f'{i} {x.stage}: {k}':v for i,x in enumerate(r.ends[:n]) for k,v in words(x, r).items()}, steps(r, {x.stage for x in b.ends}), files(r, n)) for r in (a, b)]
    return [f'{k} is {two.get(k)}, undisturbed {one.get(k)}' for one,two in zip(*both) for k in sorted(one|two, key=str) if one.get(k)!=two.get(k)]

def litter(room):
    "What killed writers left that nothing will ever read, in words: temporary files, weights that no card names"
    named = {n for p in room.home.rglob('*.json') if 'checkpoints' in p.parts and p.name!='ledger.json' for n in (read_json(p).get('files') or ())}
    files = [p for p in room.home.rglob('*') if p.is_file() and 'pack' not in p.parts]
    return [f'temporary file in {p.relative_to(room.home).parts[0]}' for p in files if p.suffix in ('.part','.tmp')]+['weights or state that no card names' for p in files if p.suffix in ('.safetensors','.pt') and p.name not in named]

# ---- kills, and where they hit

def kind(a):
    "Where a kill hit, by the functions that were running"
    if not a.stack: return 'the start of the shell'
    on = {m for m,_ in a.stack}; called = {n for _,n in a.stack}
    if a.stage=='prepare': return 'writing a shard' if 'clips' in on and 'store_video' in called else 'finding faces' if 'store_video' in called else 'report, journal, manifest' if 'pack' in on else 'the rest of prepare'
    if 'save_weights' in called: return 'named weights and their card'
    if 'save_checkpoint' in called: return 'writing a checkpoint'
    if 'evaluation' in on: return 'judging'
    if called&{'restore','load_checkpoint','load_model','latest'}: return 'reading a checkpoint'
    if a.stage.startswith('phase'): return 'a step of training' if called&{'one_step','next_batch'} else 'journal, figure, lease' if 'training' in on else 'before and after training'
    return 'before and after judging'

def after_row(run, n, seconds):
    "A `watch`: so many seconds after row `n` of the journal was there"
    due = [None]
    def watch(pid):
        if due[0] is None and (f := run/'metrics.jsonl').exists() and f.read_bytes().count(b'\n')>=n: due[0] = time.monotonic()+seconds
        return due[0] is not None and time.monotonic()>=due[0]
    return watch

def done(room, i, tries):
    "How many rows of the journal the next start will not write again, or only pass over: shards, or steps and evaluations"
    return len({k for a in room.attempts[len(room.attempts)-tries:] for k in steps_of(a)}) if i else len(list((room.home/'store').rglob('[!.]*.zip')))

FILES = (r'\.zip', r'-step', r'_best', r'') # shards, checkpoints, named weights and cards, all

def at_random(lab, rng, most, each):
    "A `kill` for `Laboratory.run`: at any moment, at any operation on some kind of file (half of the writes are torn) or shortly after any row of the journal. A stage is killed `each` times as surely as may be, then with luck it gets through; after `most` kills nothing more happens"
    left = [most]
    def kill(room, i, tries):
        left[0] -= tries>0
        if left[0]<=0: return {}
        whole = lab.whole.ends[i]; rows = len(read_rows(whole.run)); there = min(rows, done(room, i, tries)) if rows else 0
        more = 1.6*1.1**tries if tries>=(each if rows else 1) else 1-.7*there/max(1, rows) # a stage that keeps nothing on its way must get through now and then
        how = rng.choices(('row','operation','moment'), (.35, .4, .25) if rows else (0, .4, .6))[0]
        if how=='row': return dict(watch=after_row(lab.next_run(room, i), rng.randint(1, max(1, rows-there)), rng.uniform(0, .4)))
        if how=='moment': return dict(delay=rng.uniform(0, more*whole.seconds))
        n,p = rng.choice([(n, p) for p in FILES if (n := sum(bool(re.search(p, f)) for _,f in whole.ops))])
        return dict(die_at=(rng.randint(1, math.ceil(more*n)), p), torn=rng.random()<.5)
    return kill

def series(lab, kills, seed, each=4):
    "Plan after plan, killed at random until there were `kills` of them, the last one only as often as is still needed: rooms, for each what differs from the undisturbed one, and what was left over. Every second plan keeps a checkpoint now and then only, every third has Phase B, every fifth has workers"
    rng,rooms,bad,left = random.Random(seed),[],[],[]
    while (n := sum(len(r.kills) for r in rooms))<kills:
        k = len(rooms)+1
        rooms.append(r := lab.room(f'plan {k}')); phases = lab.plan if k%3==0 else lab.plan[:3]
        more = (dict(save_minutes=.01) if k%2==0 else {})|(dict(workers=1) if k%5==0 else {})
        try: lab.run(f'plan {k}', at_random(lab, rng, kills-n, each), r, len(phases), more); bad.append(differences(lab.whole, r))
        except AssertionError as e: bad.append([str(e)]) # a stage ended in an error, though it was only killed
        lab.say(f"plan {k}: {len(r.kills)} kills in {len(phases)} stages{f' with {more}' if more else ''}, {'the same in bits' if not bad[-1] else bad[-1]}")
        if bad[-1] and not r.kills: break
        left += litter(r); shutil.rmtree(r.home)
    return rooms,bad,left

def summary(lab, rooms, bad, left, seed, seconds):
    "What a series has shown, for records/crashes.json"
    killed = [a for r in rooms for a in r.kills]
    where = {s:dict(Counter(kind(a) for a in killed if a.stage==s).most_common()) for s in dict.fromkeys(s for s,_ in lab.plan)}
    return dict(kills=len(killed), seed=seed, plans=len(rooms), same_in_bits=sum(not b for b in bad), differences=[d for b in bad for d in b][:50], where=where, how=dict(Counter(a.how for a in killed)), left_over=dict(Counter(left)),
                starts=sum(len(r.attempts) for r in rooms), most_kills_of_a_stage=max(Counter((i, a.stage) for i,r in enumerate(rooms) for a in r.kills).values(), default=0), seconds=round(seconds),
                undisturbed={f'{i+1} {a.stage}':dict(seconds=round(a.seconds, 1), file_operations=len(a.ops)) for i,a in enumerate(lab.whole.ends)},
                model_sha256={a.stage:a.metrics['model_sha256'] for a in lab.whole.ends if 'model_sha256' in a.metrics}, given={k:v for k,v in lab.given.items() if k!='videos'})

def table(s):
    "A summary in a few lines"
    rows = [(stage, k, n) for stage,ks in s['where'].items() for k,n in ks.items()]
    return '\n'.join([f"{stage:10}{k:32}{n:5}" for stage,k,n in rows]+[f"{'all':10}{', '.join(f'{n} at a random {h}' for h,n in s['how'].items()):32}{s['kills']:5}",
                      f"{s['same_in_bits']} of {s['plans']} plans ended with the bits of the undisturbed one (seed {s['seed']}, {s['starts']} starts, {s['seconds']} s; left over: {s['left_over'] or 'nothing'})", *s['differences']])

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0]); p.add_argument('--kills', type=int, default=200); p.add_argument('--seed', type=int, default=0)
    p.add_argument('--record', default=ROOT/'records'/'crashes.json', help='where the summary goes'); a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        start = time.monotonic(); lab = Laboratory(d, say=lambda s: print(s, flush=True)); print(f'the undisturbed plan took {time.monotonic()-start:.0f} s', flush=True)
        s = summary(lab, *series(lab, a.kills, a.seed), a.seed, time.monotonic()-start)
    write_json(Path(a.record), s|dict(table=table(s).splitlines())); print(table(s)); return int(bool(s['differences']))

if __name__=='__main__': sys.exit(main())
