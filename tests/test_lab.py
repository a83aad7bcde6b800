"The widget of chapter 49 in a real JupyterLab, driven by a real browser: by mouse, by keys, with good films and bad ones"
import io,json,os,re,shutil,signal,socket,subprocess,sys,tempfile,time,urllib.request
from pathlib import Path
import nbformat,numpy as np,psutil,pytest
from PIL import Image
from common import wait_for
from deepfake_nb.look import untrained
from deepfake_nb.pack import sample

CHROMIUM = next((p for p in ('/usr/bin/chromium','/usr/bin/chromium-browser') if Path(p).exists()), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='no Chromium: apt-get install chromium')
CELLS = ('from deepfake_nb.look import Look\nboard = Look(["{model}"], every=.5); board', 'print(6*7)',
         'from deepfake_nb.look import Timeline\nTimeline(tracks=[dict(name=n, answer=a, score=m, moments=[[t, t+.1, .5, 1] for t in ts]) for n,a,m,ts in (("face 0", "real", .1, range(9)), ("face 1", "fake", .6, range(5, 9)))], seconds=10., fake_at=.4, real_at=.2)')

CONNECTED = "() => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.connectionStatus==='connected'"
BUSY = "() => void window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code:'import ctypes; ctypes.PyDLL(None).sleep(2)'})" # the interpreter stands still: Lab hands widgets a thread of their own, which a busy cell does not hold up

def settings(folder):
    "A Lab of its own: nothing of the user's is read or written, no news are asked for"
    names = ('JUPYTER_CONFIG_DIR','JUPYTER_DATA_DIR','JUPYTER_RUNTIME_DIR','JUPYTERLAB_SETTINGS_DIR','JUPYTERLAB_WORKSPACES_DIR','IPYTHONDIR')
    off = folder/'JUPYTERLAB_SETTINGS_DIR'/'@jupyterlab'/'apputils-extension'/'notification.jupyterlab-settings'; off.parent.mkdir(parents=True)
    off.write_text(json.dumps(dict(fetchNews='false', checkForUpdates=False, doNotDisturbMode=True)))
    (folder/'tmp').mkdir(); return os.environ|{n:str(folder/n) for n in names}|dict(TMPDIR=str(folder/'tmp'), OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "Address of a JupyterLab server with one notebook, and the folder of all that it has"
    d = tmp_path_factory.mktemp('lab'); (d/'nbs').mkdir(); model = untrained(d/'model')
    cells = [nbformat.v4.new_code_cell(c.format(model=model)) for c in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))), d/'nbs'/'look.ipynb')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    flags = ['--no-browser','--allow-root',f'--port={port}','--ServerApp.ip=127.0.0.1','--ServerApp.port_retries=0','--IdentityProvider.token=look',f'--ServerApp.root_dir={d/"nbs"}','--LabApp.expose_app_in_browser=True','--LabApp.news_url=']
    with open(d/'lab.log', 'w') as log: p = subprocess.Popen([sys.executable,'-m','jupyter','lab',*flags], env=settings(d), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try: wait_for(lambda: p.poll() is not None or answers(port)); assert p.poll() is None, (d/'lab.log').read_text()[-2000:]; yield d,f'http://127.0.0.1:{port}',p
    finally: p.terminate(); p.wait(30)

def answers(port):
    try: return urllib.request.urlopen(f'http://127.0.0.1:{port}/api?token=look', timeout=2).status==200
    except OSError: return False

@pytest.fixture(scope='module')
def page(lab):
    "The notebook in the browser, all cells run"
    from playwright.sync_api import sync_playwright
    d,url,_ = lab
    with sync_playwright() as pw:
        b = pw.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox']); g = b.new_page(viewport=dict(width=1200, height=1500))
        g.errors = []; g.on('pageerror', lambda e: g.errors.append(str(e)))
        g.goto(f'{url}/lab/tree/look.ipynb?token=look'); g.wait_for_selector('.jp-Notebook .jp-Cell'); g.wait_for_function(CONNECTED, timeout=60_000) # a cell that is run before its kernel is there is run by nobody
        g.locator('.jp-CodeCell').first.click(); g.get_by_text('Run', exact=True).first.click(); g.get_by_text('Run All Cells', exact=True).click()
        g.get_by_role('button', name='Run', exact=True).wait_for(timeout=120_000); yield g
        b.close()

def shot(g, lab, name):
    "A screenshot, kept beside the server's log; never blank"
    data = g.screenshot(path=lab[0]/f'{name}.png'); a = np.asarray(Image.open(io.BytesIO(data)).convert('L'), float)
    assert a.std()>8 and len(np.unique(a))>50; return a

def board(g): return g.locator('.jp-OutputArea-output', has=g.get_by_role('button', name='Stop')).first
def press(g, name): board(g).get_by_role('button', name=name, exact=True).click()
def faces(g): return board(g).get_by_role('slider', name='scores over time')
def words(g, has): g.locator('.dfnb-look', has_text=has).first.wait_for(timeout=60_000); return board(g).inner_text()
def picture(g): return g.locator('.dfnb-look img').first.get_attribute('src')
def readers(lab): return [p for p in psutil.Process(lab[2].pid).children(recursive=True) if 'reader_main' in ' '.join(p.cmdline())]
def settled(g): g.get_by_text('looking for the reasons').wait_for(state='detached', timeout=60_000)
def opened(g):
    "The moment that the slider names, once it stands beneath with its reasons: its time and its picture"
    def there():
        t = float(board(g).locator('[role=slider][tabindex="0"]').get_attribute('aria-valuenow')); at = re.findall(r'[\d.]+', (g.locator('.dfnb-look h3', has_text='Face').all_inner_texts() or [''])[0])
        return t if len(at)>2 and float(at[1])-.06<=t<=float(at[2])+.06 else None
    t = wait_for(there); settled(g); return t,picture(g)

def now(g): return board(g).locator('[role=slider][tabindex="0"]').get_attribute('aria-valuenow')
def step(g, do):
    "A click or a key, and the other moment that it leads to: the picture follows a frame later, so the old one may still stand when it is asked too soon"
    old = now(g); do(); wait_for(lambda: now(g)!=old); return opened(g)

def judge(g, path, has):
    "By its path, from the text field to the last word"
    box = board(g).get_by_label('Film'); box.fill(str(path)); box.press('Tab'); press(g, 'Run'); return words(g, has)

@pytest.fixture(scope='module')
def judged(page, lab): said = judge(page, sample('man_then_cartoon'), 'moments judged'); settled(page); return said

def test_a_film_by_its_path(page, lab, judged):
    assert "Can't tell" in judged and 'no calibration' in judged and 'scores mean nothing' in judged # an honest answer of a detector that has learned nothing
    face = faces(page).first; lo,now,hi = (float(face.get_attribute(f'aria-value{k}')) for k in ('min','now','max'))
    assert 0<=lo<=now<=hi<7 and lo<hi and re.fullmatch(r'\d+\.\d s, score 0\.\d\d', face.get_attribute('aria-valuetext'))
    names = page.locator('.dfnb-look img').evaluate_all('all => all.map(x => x.alt)')
    assert 'Face 0 at' in names[0] and any('What spoke for fake' in n for n in names) and sum('log energy' in n for n in names)==8
    assert not readers(lab) and not page.errors; shot(page, lab, 'judged')

def test_it_was_live(page, lab):
    "Points are added while the film is read, and the kernel answers meanwhile"
    seen = []; box = board(page).get_by_label('Film'); box.fill(str(sample('woman'))); box.press('Tab'); press(page, 'Run')
    page.locator('.jp-CodeCell').nth(1).click(); page.keyboard.press('Shift+Enter')
    answered = False
    while board(page).get_by_role('button', name='Stop').is_enabled() or not seen:
        seen.append(board(page).locator('.dfnb-timeline circle').count()); answered |= bool(seen[-1]) and page.locator('.jp-OutputArea-output', has_text='42').count()>0; time.sleep(.1)
    assert len({n for n in seen if n})>=3 and answered; words(page, 'moments judged'); settled(page)

def test_click_and_keys(page, judged, lab):
    face = faces(page).first; b = face.bounding_box(); at = []; face.focus(); page.keyboard.press('Home'); opened(page)
    for x in (.3,.7): at.append(step(page, lambda: face.click(position=dict(x=b['width']*x, y=60))))
    assert at[0][0]<at[1][0] and at[0][1]!=at[1][1] # another moment, another face
    for k in ('ArrowLeft','ArrowRight','Home','End'): at.append(step(page, lambda: page.keyboard.press(k)))
    t = [x for x,_ in at]; assert t[2]<t[1]==t[3] and t[4]==float(face.get_attribute('aria-valuemin')) and t[5]==float(face.get_attribute('aria-valuemax'))
    assert face.evaluate('x => x===document.activeElement && getComputedStyle(x).outlineStyle')=='solid' # still there, and to be seen
    shot(page, lab, 'keys')

def test_keys_alone(page, judged):
    "From the text field on, never a mouse: to Run, and to the picture of a moment; the whole path arrives though the kernel stands still while it is typed"
    page.evaluate(BUSY); board(page).get_by_label('Film').focus(); page.keyboard.press('Control+a'); page.keyboard.type(str(sample('man_then_cartoon'))); seen = []
    def tab(to):
        for _ in range(6):
            page.keyboard.press('Tab'); seen.append(page.evaluate('() => document.activeElement.getAttribute("aria-label") || document.activeElement.innerText || document.activeElement.type'))
            if to in seen[-1]: return
        raise AssertionError(f'no {to!r} in {seen}')
    stop = board(page).get_by_role('button', name='Stop'); tab('Run'); page.keyboard.press('Enter')
    wait_for(stop.is_enabled); wait_for(lambda: not stop.is_enabled()); settled(page)
    tab('scores over time'); old = opened(page); new = step(page, lambda: page.keyboard.press('ArrowRight'))
    assert old[0]<new[0] and old[1]!=new[1]

def test_from_face_to_face(page):
    "Up and Down keep the time, not the place in the list, and Lab does not take them for its own"
    two = page.locator('.jp-CodeCell').nth(2).get_by_role('slider', name='scores over time'); a,b = two.nth(0),two.nth(1); a.focus()
    for k in ('Home',*['ArrowRight']*7,'ArrowDown'): page.keyboard.press(k)
    wait_for(lambda: b.get_attribute('aria-valuetext').startswith(('7.0 s','7.1 s'))); assert b.evaluate('x => x===document.activeElement') and a.get_attribute('tabindex')=='-1'
    page.keyboard.press('Home'); page.keyboard.press('ArrowUp'); wait_for(lambda: a.get_attribute('aria-valuetext').startswith(('5.0 s','5.1 s'))); assert a.evaluate('x => x===document.activeElement')

def test_a_moment_has_the_word_of_its_face(page):
    "The same scores, past the line for fake: only those of the face that is called fake are drawn and said to be; the mean is the report's"
    two = page.locator('.jp-CodeCell').nth(2).get_by_role('slider', name='scores over time'); seen = []
    for face in (two.nth(0), two.nth(1)):
        face.focus(); page.keyboard.press('End'); wait_for(lambda: face.get_attribute('aria-valuetext')!='no moment chosen'); text = face.get_attribute('aria-valuetext'); assert 'score 0.50' in text
        seen.append((face.locator('circle.fake').count(), 'above the line for fake' in text, face.locator('text.title').text_content()))
    assert seen==[(0, False, 'face 0: real, mean 0.10'), (4, True, 'face 1: fake, mean 0.60')]

def test_a_file_that_is_sent(page, lab, judged):
    "Slice by slice through the file chooser; after the verdict nothing of it is left"
    f = lab[0]/'sent.mp4'; shutil.copy(sample('man'), f); f.write_bytes(f.read_bytes()+bytes(12_000_000)) # more than one message of the server may hold
    with page.expect_file_chooser() as chooser: board(page).locator('input[type=file]').click()
    chooser.value.set_files(f); page.get_by_text(f'here, {f.stat().st_size:,} bytes').wait_for(timeout=60_000)
    assert not board(page).get_by_label('Film').input_value(); left = lambda: list(lab[0].glob('tmp/deepfake_nb-*/film')); assert len(left())==1
    press(page, 'Run'); assert 'sent.mp4' in words(page, 'sent.mp4: '); settled(page); assert not left()
    assert 'removed after it was judged' in board(page).inner_text()

def test_bad_files_end_in_words(page, lab, judged):
    bad = lab[0]/'bad.mp4'; bad.write_bytes(b'<script>no film</script>'*500)
    for path,has in ((bad,'bad.mp4: '), (lab[0]/'nowhere.mp4','cannot be opened'), (lab[0],'it is a folder'), ('~nobody of this name/film.mp4','cannot be opened'), ('','no film was named')):
        said = judge(page, path, has); assert 'Remedy' in said and 'Traceback' not in said
    assert not readers(lab) and not page.errors; shot(page, lab, 'bad')

def test_stop_ends_the_reader(page, lab, judged):
    box = board(page).get_by_label('Film'); box.fill(str(sample('woman'))); box.press('Tab'); press(page, 'Run')
    wait_for(lambda: board(page).locator('.dfnb-timeline circle').count()); assert readers(lab); press(page, 'Stop'); said = words(page, 'Stopped.')
    assert 'it is no verdict' in said and not readers(lab); wait_for(board(page).get_by_role('button', name='Run', exact=True).is_enabled)

def test_dark_narrow_and_large(page, lab, judged):
    "The theme of Lab, a window of 390 px, and letters twice as large: nothing is cut off to the right"
    judge(page, sample('man_then_cartoon'), 'moments judged'); opened(page); light = shot(page, lab, 'light')
    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme:'JupyterLab Dark'})"); page.wait_for_function("() => document.body.dataset.jpThemeLight==='false'"); time.sleep(.5)
    dark = shot(page, lab, 'dark'); assert light.mean()>180 and dark.mean()<90
    letters = faces(page).first.locator('text').first.evaluate('x => getComputedStyle(x).fill'); assert min(map(int, re.findall(r'\d+', letters)[:3]))>150 # light letters on it
    page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
    for name,size in (('narrow',dict(width=390, height=1400)), ('large',dict(width=600, height=750))):
        page.set_viewport_size(size); time.sleep(.7); board(page).scroll_into_view_if_needed(); shot(page, lab, name)
        wide,room = board(page).evaluate('x => [Math.max(...[...x.querySelectorAll("svg, img, p, h3, button, input")].map(e => e.getBoundingClientRect().right)), x.getBoundingClientRect().right]'); assert wide<=room+1, (name, wide, room)
