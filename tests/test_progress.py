"Live lines in a real pseudo-terminal: redrawn in place, resized, interrupted, gone; quiet in a log and in CI; figures and lines in a real kernel. SOAK=N for the long count."
import fcntl,json,os,pty,random,re,select,signal,struct,subprocess,sys,termios,time
from pathlib import Path
import pytest
from common import count,told,wait_for
from deepfake_nb.journal import Journal
from deepfake_nb.progress import Bar,Lines,Look,Screen,cells,table

HERE = Path(__file__).parent
NAMES = ('phase_a','bg','av')
WATCH = '''import sys
from pathlib import Path
from deepfake_nb.progress import Lines,follow
root = Path(sys.argv[1]); names = sys.argv[2].split(',')
with Lines(every=.02) as lines: follow({n:root/n for n in names}, lines, every=.01)
sys.stderr.write('after\\n')
'''
TRAIN = '''import signal,sys,time
from pathlib import Path
from deepfake_nb.progress import Bar,Lines
signal.signal(signal.SIGHUP, signal.SIG_IGN)
bar = Bar(60, name='phase_a', lines=Lines(every=.02))
for i in range(60): time.sleep(.03); bar.update(loss=1/(1+i), spent=i*.01, dollars=2.5)
bar.set(state='done'); bar.close(); Path(sys.argv[1]).write_text(bar.lines.mode)
'''

class Terminal:
    "A process in a terminal of its own, and what a person sees there"
    def __init__(self, code, *args, cols=100, rows=10, **env):
        self.master,slave = pty.openpty(); self.size(cols, rows); self.screen,self.all = Screen(cols, rows),''
        clean = {k:v for k,v in os.environ.items() if k not in ('CI','DEEPFAKE_NB_RUN','COLUMNS','LINES')}
        self.p = subprocess.Popen([sys.executable,'-c',code,*map(str, args)], cwd=HERE.parent, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env=clean|dict(TERM='xterm', PYTHONIOENCODING='utf-8')|env, preexec_fn=self.begin)
        os.close(slave)
    @staticmethod
    def begin():
        "A terminal of its own, in which Ctrl-C is heard, whatever those who started us ignore or block"
        fcntl.ioctl(0, termios.TIOCSCTTY, 0); signal.signal(signal.SIGINT, signal.SIG_DFL); signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    def size(self, cols, rows): fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack('HHHH', rows, cols, 0, 0))
    def read(self, until, seconds=60):
        "Read on until `until(screen)` holds; each whole frame is looked at"
        end,rest = time.monotonic()+seconds,b''
        while not until(self.screen):
            assert time.monotonic()<end, self.screen.seen()
            if not select.select([self.master], [], [], .05)[0]: continue
            try: rest += os.read(self.master, 65536)
            except OSError: break # the other end is closed: the process has ended
            frames = re.split(rb'(?<=\x1b\[J)', rest); rest = frames.pop() if b'\x1b' in frames[-1] else b''
            for f in map(bytes.decode, frames): self.all += f; self.screen.feed(f)
        return self.screen.seen()
    def close(self):
        self.p.kill(); self.p.wait(); os.close(self.master)

def status(i, steps=400, state='running', **kw): return dict(state=state, step=i, steps=steps, loss=1/(1+i), auc=.8, speed=3., eta=(steps-i)/3, spent=i*.001, dollars=2.5, checkpoint=0)|kw

@pytest.fixture
def runs(tmp_path):
    js = {n:Journal(tmp_path/n, every=0) for n in NAMES}
    def beat(i, state='running', names=NAMES, **kw):
        for n in names: js[n].beat(**status(i, state=state, **kw))
    yield tmp_path,beat
    for j in js.values(): j.close()

def watch(root, names=NAMES, **kw): return Terminal(WATCH, root, ','.join(names), **kw)
def shows(*what): return lambda s: all(any(w in r for r in s.seen()) for w in what)

def test_three_runs_in_their_place(runs):
    "Hundreds of frames, three rows; who has ended stays above; the prompt comes below"
    root,beat = runs; beat(0); term = watch(root)
    try:
        for i in range(1, 101): beat(i); got = term.read(shows(f' {i}/400'))
        assert [r.split()[0] for r in got] == list(NAMES) and term.screen.gone==[] and term.all.count('\x1b[J')>=100
        assert (term.screen.r, term.screen.c)==(3, 0) and max(map(cells, got))<100
        beat(400, 'done', ['bg'], eta=0.); got = term.read(shows('done'))
        assert [r.split()[0] for r in got] == ['bg','phase_a','av']
        beat(200, names=['phase_a','av']); beat(400, 'done', ['av']); beat(250, 'failed', ['phase_a'], error='RuntimeError: out of memory')
        got = term.read(shows('after'))
        assert sorted(r.split()[0] for r in got[:3])==sorted(NAMES) and got[3]=='after' and len(got)==4
        assert 'out of memory' in ' '.join(got) and term.p.wait(30)==0
        assert set(re.findall(r'\x1b\[\d*(.)', term.all))==set('AJK')
    finally: term.close()

def test_a_terminal_that_changes_its_size(runs):
    root,beat = runs; beat(0); term = watch(root, cols=110, rows=10)
    try:
        beat(5); wide = term.read(shows(' 5/400')); assert '█' in wide[0] or '░' in wide[0]
        term.size(50, 10); term.screen.resize(50, 10); beat(80); got = term.read(shows(' 20%'))
        assert len(got)==6 and max(map(cells, got[-3:]))<50 # the old block stands above, once
        for i in range(81, 161): beat(i)
        got = term.read(shows(' 40%')); assert len(got)==6
        term.size(110, 3); term.screen.resize(110, 3); beat(200); got = term.read(shows(' 200/400'))
        assert got[-1]=='... and 2 more' and term.screen.r==2
    finally: term.close()

def test_more_runs_than_rows(tmp_path):
    names = [f'run{i:02}' for i in range(12)]
    for n in names[3:]: j = Journal(tmp_path/n); j.beat(**status(7)); j.close()
    term = watch(tmp_path, names, rows=5)
    try:
        got = term.read(shows('more')); assert [r.split()[0] for r in got]==['run03','run04','run05','...'] and got[3]=='... and 9 more'
        assert term.screen.gone==[]
    finally: term.close()

def test_ctrl_c_leaves_the_cursor_below(runs):
    "The key itself, through the terminal: the lines stay whole, the traceback comes below them, no mode is left behind"
    root,beat = runs; beat(3); term = watch(root, rows=40)
    try:
        term.read(shows(' 3/400')); press = lambda: os.write(term.master, b'\x03'); press(); again = time.monotonic()+10
        def seen(screen): # Python loses a key that falls into a finaliser; then one presses again
            nonlocal again
            if time.monotonic()>again and not shows('KeyboardInterrupt')(screen): press(); again = time.monotonic()+10
            return shows('KeyboardInterrupt')(screen)
        got = term.read(seen); assert term.p.wait(30)!=0
        assert [r.split()[0] for r in got[:3]]==list(NAMES) and got[3].startswith('Traceback')
        assert '\x1b[?' not in term.all
    finally: term.close()

def test_ctrl_c_at_the_moment_when_a_write_returns():
    "The frame is on the screen, the program does not know yet: the last frame takes its place all the same"
    class Pressed:
        screen,writes = Screen(100, 10),0
        def write(self, text):
            self.screen.feed(text); self.writes += 1
            if self.writes==2: raise KeyboardInterrupt
        def flush(self): pass
    out = Pressed()
    with pytest.raises(KeyboardInterrupt), Lines(out, mode='terminal', every=0, size=lambda: (100, 10)) as lines:
        lines.say('above'); lines.show({n:status(1) for n in NAMES}); raise AssertionError('nobody pressed it')
    assert out.writes==3 and [r.split()[0] for r in out.screen.seen()]==['above',*NAMES]

def test_one_live_line_in_a_training(tmp_path):
    term = Terminal(TRAIN, tmp_path/'end')
    try:
        got = term.read(shows('40/60')); assert len(got)==1 and 'eta' in got[0] and '/$2.50' in got[0]
        got = term.read(shows('done')); assert len(got)==1 and term.p.wait(30)==0 and (tmp_path/'end').read_text()=='terminal'
    finally: term.close()

@pytest.mark.parametrize('unbuffered', ['','1'])
def test_a_terminal_that_goes_away_does_not_end_a_training(tmp_path, unbuffered):
    term = Terminal(TRAIN, tmp_path/'end', PYTHONUNBUFFERED=unbuffered); term.read(shows(' 5/60')); os.close(term.master)
    assert term.p.wait(60)==0 and (tmp_path/'end').read_text()=='none'

@pytest.mark.parametrize('how', ['file','ci'])
def test_quiet_where_nobody_watches(runs, tmp_path, how):
    "A file, and a terminal with CI set: a line when a state changes, no control character"
    root,beat = runs; beat(1)
    if how=='ci': term = watch(root, cols=300, CI='true'); p = term.p
    else: log = open(tmp_path/'log', 'wb'); p = subprocess.Popen([sys.executable,'-c',WATCH,str(root),','.join(NAMES)], cwd=HERE.parent, stderr=log)
    def text():
        if how=='file': return (tmp_path/'log').read_text()
        try:
            if select.select([term.master], [], [], 0)[0]: term.all += os.read(term.master, 65536).decode()
        except OSError: pass # the process has ended
        return term.all.replace('\r\n', '\n')
    try:
        wait_for(lambda: text().count('\n')==3)
        for i in range(2, 60): beat(i); time.sleep(.01)
        beat(400, 'done'); wait_for(lambda: 'after' in text()); assert p.wait(30)==0
        lines = text().splitlines(); assert len(lines)==7 and lines[-1]=='after'
        assert sorted(l.split()[0] for l in lines[:-1])==sorted(2*NAMES) and sum(l.endswith('done') for l in lines)==3
        assert text().isascii() and not set(text())&set('\r\x1b\x08')
    finally: term.close() if how=='ci' else p.kill()

def test_a_bar_in_a_captured_test_is_quiet(capfd):
    bar = Bar(500)
    for i in range(500): bar.update(loss=.5)
    bar.set(state='done'); bar.close(); err = capfd.readouterr().err
    assert err.count('\n')==2 and '\r' not in err and '\x1b' not in err

def test_torn_and_missing_statuses(tmp_path):
    "A file that is rewritten in place, cut anywhere or taken away: the reader sees an older status, never an error"
    n,seed,good = count(2000),1,0; rng = random.Random(seed); look = Look(tmp_path); f = tmp_path/'status.json'; last = -1
    for i in range(n):
        whole = json.dumps(status(i)); kind = rng.choice(['whole','torn','gone','empty','list'])
        if kind=='gone': f.unlink(missing_ok=True)
        else: f.write_text(dict(whole=whole, torn=whole[:rng.randrange(1, len(whole))], empty='', list='[1]')[kind])
        if kind=='whole': last = i
        s = look(); good += s.get('step', -1)==last and s['state'] in ('running','waiting','unreadable')
    told(good, n, 'statuses torn, missing and whole', seed)

def test_whatever_a_status_says_the_table_fits():
    "Random statuses, names and widths: no line is wider than the terminal, none holds a control character, all stand in columns"
    n,seed,good = count(300),2,0; rng = random.Random(seed)
    odd = [None, 0, -1, 1e300, float('nan'), float('inf'), 'nan', '\x1b[2J', '漢字', '', 'a\nb', [1], {}, True]
    for _ in range(n):
        def one(): return {k:rng.choice(odd) if rng.random()<.3 else v for k,v in status(rng.randrange(400), state=rng.choice(['running','done','failed','wait']), age=rng.choice([None, 1., 1e4]), error=rng.choice(['', 'E: '+'x'*80])).items() if rng.random()<.9}
        width,plain = rng.randrange(0, 160),rng.random()<.5
        rows = table({rng.choice(['a','漢字','x'*70,'b\x1b[31m'])+str(i):one() for i in range(rng.randrange(1, 6))}, width, plain=plain).values()
        good += all(cells(r)<=width and r.isprintable() and (r.isascii() or not plain) for r in rows)
    told(good, n, 'tables that fit', seed)

def test_a_step_costs_nothing_to_speak_of():
    "A thousand steps with a bar, against the shortest step that anybody trains with (1 ms): a tenth of it"
    with open(os.devnull, 'w') as nul:
        bar = Bar(2000, lines=Lines(nul, mode='terminal', size=lambda: (100, 24))); t = time.process_time()
        for i in range(1000): bar.update(loss=.5, auc=.8, spent=.1, dollars=2.5)
        assert time.process_time()-t < .1

def test_figures_and_lines_in_a_real_kernel(tmp_path):
    "Each is one output, and it is the last: the figure with its money, the board, the lines"
    import nbformat
    from nbclient import NotebookClient
    code = ["import base64,os; from types import SimpleNamespace as H\nfrom deepfake_nb.journal import LiveFigure,Journal\nfrom deepfake_nb.progress import Bar,Board\nos.environ.pop('CI', None); os.environ.pop('DEEPFAKE_NB_RUN', None)",
            "live = LiveFigure(every=0)\nfor n in (2, 5, 9): live.update(H(steps=range(n), losses=range(n), evals=[(0,dict(auc=.5))], money=[(n,.1*n)], dollars=2.5, eta=60.*(9-n), reason='steps' if n==9 else ''))",
            "print(base64.b64encode(live.png).decode())",
            f"j = Journal({str(tmp_path/'a')!r}, every=0); b = Board(dict(a={str(tmp_path/'a')!r}), every=0)\nfor n in (1, 5, 9): j.beat(step=n, steps=9, eta=9.-n); b.update()",
            "print(base64.b64encode(b.png).decode())",
            "bar = Bar(50, name='phase_a')\nfor i in range(50): bar.update(loss=.25, spent=1., dollars=2.5)\nbar.set(state='done'); bar.close()"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in code])
    env = {k:os.environ.pop(k) for k in ('CI','DEEPFAKE_NB_RUN') if k in os.environ}
    try: NotebookClient(nb, timeout=300, kernel_name='python3', resources={'metadata':{'path':str(HERE.parent)}}).execute()
    finally: os.environ |= env
    for fig,said in ((1,2),(3,4)):
        images = [o for o in nb.cells[fig].outputs if 'image/png' in o.get('data', {})]
        assert len(images)==1 and images[0]['data']['image/png'].replace('\n', '').strip()==nb.cells[said].outputs[0]['text'].strip()
    out, = nb.cells[5].outputs
    text = out['data']['text/plain']
    assert text.count('phase_a')==1 and text.endswith('done') and 'eta' not in text and '$1.00/$2.50' in text
