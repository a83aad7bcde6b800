"Everything `make test` checks, in order; `--save` runs the chapters and keeps their outputs instead. The last line counts."
import filecmp,shutil,subprocess,sys,tempfile,time,xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import imports,law

def sh(*args, cwd=ROOT):
    "Exit status and everything printed"
    p = subprocess.run([str(a) for a in args], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)
    return p.returncode,p.stdout

def python(*args, cwd=ROOT): return sh(sys.executable, *args, cwd=cwd)

def copy_of_sources(tmp):
    "The sources alone, so that nothing in the tree is touched"
    shutil.copytree(ROOT/'nbs', tmp/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    for f in ('settings.ini','pyproject.toml'): shutil.copy(ROOT/f, tmp)

def generated(folder): return {str(p.relative_to(folder)) for p in folder.rglob('*.py')}

def export_drift():
    "The package is what the notebooks export, file for file"
    with tempfile.TemporaryDirectory() as d:
        tmp = Path(d); copy_of_sources(tmp); rc,out = python('-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=tmp)
        if rc: return out
        a,b = tmp/'deepfake_nb',ROOT/'deepfake_nb'
        odd = sorted(generated(a)^generated(b))
        _,differ,_ = filecmp.cmpfiles(a, b, generated(a)&generated(b), shallow=False)
    return '\n'.join(f'deepfake_nb/{f}: not what nbs/ exports (run nbdev_export)' for f in odd+differ)

def clean_drift():
    "The notebooks are as `nbdev_clean` leaves them"
    with tempfile.TemporaryDirectory() as d:
        tmp = Path(d); copy_of_sources(tmp); rc,out = python('-c', 'from nbdev.clean import nbdev_clean; nbdev_clean()', cwd=tmp)
        if rc: return out
        nbs = [p.relative_to(tmp) for p in (tmp/'nbs').rglob('*.ipynb')]
        return '\n'.join(f'{p}: run nbdev_clean' for p in nbs if (tmp/p).read_bytes()!=(ROOT/p).read_bytes())

def readme_drift(): rc,out = python('tools/readme.py', '--check'); return out if rc else ''

def chapters(): return sorted((ROOT/'nbs').glob('*.ipynb'), key=lambda p: (p.stem=='index', p.name))

def run_chapter(path, how):
    "One chapter in a process of its own, through `nbdev_test`; nbdev passes on nothing, so its `Completed` line is asked for"
    rc,out = python('tools/chapter.py', how, path)
    if rc==0 and f'Completed {path}' not in out: return f'{path.name}: nbdev_test did not say that it completed\n{out}'
    return out if rc else ''

def report(name, problem, seconds=None):
    "One line a check, and what is wrong when it failed"
    print(f"{'FAILED' if problem else 'ok'}  {name}" + (f'  {seconds:.0f} s' if seconds is not None else ''), flush=True)
    if problem: print(problem, flush=True)
    return not problem

def run_chapters(how):
    "All chapters, two at a time; the first alone, since it fills the cache. One result each"
    def one(path):
        s = time.time(); problem = run_chapter(path, how)
        return report(f'chapter {path.name}', problem, time.time()-s)
    first,*rest = chapters()
    with ThreadPoolExecutor(2) as pool: return [one(first), *pool.map(one, rest)]

def run_tests(path):
    "Passed and failed tests of one file, counted by pytest itself, in a process of its own: what one file leaves behind (threads, open connections) is not forked by the next"
    start = time.time()
    with tempfile.TemporaryDirectory() as d:
        xml = Path(d)/'r.xml'
        rc = subprocess.run([sys.executable,'-m','pytest',f'--junitxml={xml}','--durations=3',path], cwd=ROOT, stdin=subprocess.DEVNULL).returncode
        if not xml.exists(): return [report(path.name, f'exit {rc}, no report')]
        suite = ET.parse(xml).getroot().find('testsuite').attrib
    failed,run = int(suite['failures'])+int(suite['errors']),int(suite['tests'])-int(suite['skipped'])
    report(f'tests of {path.name}: {run-failed} passed, {failed} failed', f'exit {rc}' if failed or rc else '', time.time()-start)
    return [True]*(run-failed)+[False]*max(failed, rc!=0)

def run_pytest(): return [r for p in sorted((ROOT/'tests').glob('test_*.py')) for r in run_tests(p)]

def main(save):
    start = time.time()
    if save: results = run_chapters('--save')
    else:
        results = [report(f.__name__.replace('_',' '), f()) for f in (export_drift, clean_drift, readme_drift)]
        results += [report(f'law of {p.relative_to(ROOT)}', '\n'.join(law.check(p))) for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in str(p)]
        results += [report('law of all notebooks together', '\n'.join(law.check_whole(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in str(p))))]
        results += [report('law of imports', '\n'.join(imports.check()))]
        results += run_chapters('--check')+run_pytest()
    print(f'{time.time()-start:.0f} s'); print(f'{sum(results)} passed, {len(results)-sum(results)} failed')
    sys.exit(not all(results))

if __name__=='__main__': main('--save' in sys.argv)
