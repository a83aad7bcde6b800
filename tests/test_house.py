"The laws of the house catch what they are there for: one planted fault each."
import json,shutil,subprocess,sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import imports,law

def cell(src, kind='code', tags=(), picture=False):
    c = dict(cell_type=kind, id='a'*8, metadata=dict(tags=list(tags)) if tags else {}, source=src.splitlines(True))
    if kind=='code': c |= dict(execution_count=None, outputs=[dict(output_type='display_data', metadata={}, data={'image/jpeg':'AA=='})] if picture else [])
    return c

def write(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=list(cells), metadata={}, nbformat=4, nbformat_minor=5))); return path

def section(n_asserts=3, picture=True, lines=2):
    return [cell('## An idea', 'markdown'), cell('#| export\n'+'\n'.join(f'x{i} = {i}' for i in range(lines))),
            cell('\n'.join(f'assert x{i%2}=={i%2}' for i in range(n_asserts)) or 'x0', picture=picture)]

def test_good_section_passes(tmp_path): assert law.check(write(tmp_path/'a.ipynb', *section()))==[]

@pytest.mark.parametrize('kw,says', [(dict(n_asserts=2),'2 assertions'), (dict(picture=False),'no picture'), (dict(lines=41),'41 lines')])
def test_law_catches(tmp_path, kw, says): assert any(says in b for b in law.check(write(tmp_path/'a.ipynb', *section(**kw))))

def test_long_cells_and_large_files(tmp_path):
    long = [cell('\n'.join(f'y{i} = 1' for i in range(16))) for _ in range(3)]
    assert any('median' in b for b in law.check(write(tmp_path/'a.ipynb', *long)))
    assert any('KB' in b for b in law.check(write(tmp_path/'b.ipynb', cell('x'*600_000, 'markdown'))))

def test_all_notebooks_together(tmp_path):
    long = [write(tmp_path/f'{i}.ipynb', cell('\n'.join(['x = 1']*n))) for i,n in enumerate([3]*8+[16]*2)]
    assert law.check_whole(long[:8])==[] and 'nine in ten' in law.check_whole(long)[0]

def test_stage_needs_its_tag(tmp_path):
    assert any('parameters' in b for b in law.check(write(tmp_path/'stages'/'a.ipynb', cell('x = 1'))))
    assert law.check(write(tmp_path/'stages'/'a.ipynb', cell('x = 1', tags=['parameters'])))==[]

def test_machine_paths_and_errors_in_outputs(tmp_path):
    c = cell('x = 1'); c['outputs'] = [dict(output_type='stream', name='stdout', text=['saved in /'+'home/me/x'])]
    assert any('path' in b for b in law.check(write(tmp_path/'a.ipynb', c)))
    c['outputs'] = [dict(output_type='error', ename='ValueError', evalue='', traceback=[])]
    assert any('ValueError' in b for b in law.check(write(tmp_path/'a.ipynb', c)))

@pytest.mark.parametrize('line', ['from deepfake_nb.late import *', 'from deepfake_nb import late', 'import deepfake_nb.late as l', 'def f():\n    from deepfake_nb.late import g'])
def test_import_law_catches(tmp_path, line):
    write(tmp_path/'10_early.ipynb', cell('#| default_exp early'), cell(line)); write(tmp_path/'20_late.ipynb', cell('#| default_exp late'))
    assert any('later chapter' in b for b in imports.check(tmp_path))

def test_import_law_allows_earlier(tmp_path):
    write(tmp_path/'10_early.ipynb', cell('#| default_exp early')); write(tmp_path/'20_late.ipynb', cell('#| default_exp late'), cell('%matplotlib inline\nfrom deepfake_nb.early import *'))
    assert imports.check(tmp_path)==[]

def test_nbdev_keeps_the_parameters_tag(tmp_path):
    "Without `allowed_cell_metadata_keys` this fails, and papermill would run every stage on its defaults"
    shutil.copy(ROOT/'settings.ini', tmp_path); shutil.copy(ROOT/'pyproject.toml', tmp_path)
    p = write(tmp_path/'nbs'/'a.ipynb', cell('x: int = 1  # help', tags=['parameters']))
    subprocess.run([sys.executable,'-c','from nbdev.clean import nbdev_clean; nbdev_clean()'], cwd=tmp_path, check=True)
    assert json.loads(p.read_text())['cells'][0]['metadata']=={'tags':['parameters']}

def test_chapter_runner_fails_on_error_and_on_other_text(tmp_path):
    shutil.copy(ROOT/'settings.ini', tmp_path); shutil.copy(ROOT/'pyproject.toml', tmp_path)
    run = lambda p,how: subprocess.run([sys.executable,ROOT/'tools/chapter.py',how,p], cwd=tmp_path, capture_output=True, text=True)
    good = write(tmp_path/'nbs'/'01_a.ipynb', cell('1+1'))
    assert run(good,'--save').returncode==0 and '2' in good.read_text() and run(good,'--check').returncode==0
    good.write_text(good.read_text().replace('"2"','"3"'))
    r = run(good,'--check'); assert r.returncode and 'not what is committed' in r.stderr
    assert run(write(tmp_path/'nbs'/'02_b.ipynb', cell('assert 1==2')),'--check').returncode

def test_package_imports_from_another_folder(tmp_path):
    out = subprocess.run([sys.executable,'-c','import deepfake_nb.show,deepfake_nb; print(deepfake_nb.__version__)'], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode==0 and out.stdout.strip()

def test_no_nbdev_3_table(): assert '[tool.nbdev]' not in (ROOT/'pyproject.toml').read_text().replace('a [tool.nbdev] table','')
