"The book: its contents against nbs/, a notebook as a page, the reference against the package, and the eye that looks at what came out. `make book` is the whole of it."
import ast,json,re,sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import book

def cell(src, kind='code', outputs=(), tags=(), id='a'): return dict(cell_type=kind, id=id, metadata=dict(tags=list(tags)), source=src.splitlines(True))|(dict(execution_count=None, outputs=list(outputs)) if kind=='code' else {})
def note(text, id='m'): return cell(text, 'markdown', id=id)
def put(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=list(cells), metadata={}, nbformat=4, nbformat_minor=5))); return path
def picture(**data): return dict(output_type='display_data', metadata={}, data=data)

MAP = '| | chapter |\n|---|---|\n| **see** | [01](nbs/01_a.ipynb) |\n| **go** | [02](nbs/02_b.ipynb) · [run](nbs/stages/run.ipynb) |\n'
@pytest.fixture
def nbs(tmp_path):
    put(tmp_path/'index.ipynb', note('# top\n\n| need | go to |\n|---|---|\n| read | [01](nbs/01_a.ipynb) |\n\ntext\n\n'+MAP))
    for n in ('01_a','02_b','stages/run'): put(tmp_path/f'{n}.ipynb', note(f'# {n}'))
    return tmp_path

# The contents

def test_every_notebook_of_this_book_is_on_its_map_once():
    got = book.parts(ROOT/'nbs'); names = [n for p in got.values() for n in p]
    assert len(names)==len({*names}) and {*names}==book.notebooks(ROOT/'nbs') and len(got)>7

def test_parts_follow_the_map_and_stages_are_one(nbs): assert book.parts(nbs)=={'see':['01_a'], 'go':['02_b'], 'stages: the notebooks that a run executes':['stages/run']}

def test_contents(nbs):
    t = book.toc(nbs, ['a'], ['records/x'])
    assert t['root']=='index' and [p['caption'][:4] for p in t['parts']]==['See','Go','Stag','Refe','Appe']
    assert t['parts'][3]['chapters'][0]['sections']==[dict(file='api/a')]

@pytest.mark.parametrize('change,says', [(lambda d: put(d/'03_c.ipynb', note('# c')), '03_c.ipynb is not on the map'), (lambda d: (d/'02_b.ipynb').unlink(), '02_b, which is not there'),
    (lambda d: put(d/'index.ipynb', note(MAP+'| **again** | [01](01_a.ipynb) |\n')), '01_a 2 times'), (lambda d: put(d/'index.ipynb', note('# no map')), 'stages/run.ipynb is not on the map')])
def test_a_map_that_lies_is_refused(nbs, change, says):
    change(nbs)
    with pytest.raises(book.BookError, match=re.escape(says)): book.parts(nbs)

def test_nothing_is_executed_and_every_version_is_exact():
    assert 'execute_notebooks: "off"' in (ROOT/'book/_config.yml').read_text()
    pins = [l for l in (ROOT/'book/requirements.txt').read_text().splitlines() if l and l[0]!='#']
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+', l) for l in pins) and any(l.startswith('jupyter-book==1.') for l in pins)

# A notebook as a page

KNOWN = {'1':'01_a', '2':'02_b', '12':'12_l', '6c':'06c_x'}
def page(*cells, **kw): broken = []; nb,where = book.page(dict(cells=list(cells)), '02_b', KNOWN, broken, **kw); return nb['cells'],where,broken

def test_cells_and_their_marks():
    jpeg = picture(**{'image/jpeg':'AA=='})
    cells,where,_ = page(note('# B\n\n## Idea'), cell('#| default_exp b'), cell('#| hide\nimport x'), cell('#| hide\nshow()', outputs=[jpeg]), cell('#| export\ndef f(): pass', id='e'), cell('#| eval: false\ny = ...'), cell('#| cuda\ng()'))
    assert [c['source'].splitlines()[-1] for c in cells if c['cell_type']=='code']==['show()','def f(): pass','y = ...','g()']
    assert [c['metadata']['tags'] for c in cells if c['cell_type']=='code']==[['remove-input'],['export'],['not-run'],['on-a-gpu']]
    assert where['e']==('02_b-idea','Idea') and '#api-b' in cells[1]['source']

def test_the_notebooks_are_only_read():
    path = ROOT/'nbs/12_hydra.ipynb'; before = path.read_bytes(); nb = book.read(path); copy = json.dumps(nb)
    made,_ = book.page(nb, '12_hydra', {}, [])
    assert json.dumps(nb)==copy and path.read_bytes()==before and len(made['cells'])<=len(nb['cells']) and '#| ' not in ''.join(c['source'] for c in made['cells'] if c['cell_type']=='code')

def test_chapters_are_links_outside_code_and_maths():
    md = lambda t: page(note(t))[0][0]['source']
    assert md('as in chapter 12, and chapters 1 and 6c')=='as in chapter [12](12_l.ipynb), and chapters [1](01_a.ipynb) and [6c](06c_x.ipynb)'
    assert md('`chapter 12` $chapter 12$ [chapter 12](x)')=='`chapter 12` $chapter 12$ [chapter 12](x)'
    assert md('## Chapter 12 again').endswith('## Chapter 12 again') and md('[a](nbs/01_a.ipynb) [b](CONTRIBUTING.md) [c](records/README.md)')=='[a](01_a.ipynb) [b](contributing.md) [c](records/kept.md)'
    assert page(note('see chapter 99'))[2]==['02_b: chapter 99, which is not there']

def test_a_bar_in_code_tears_a_table():
    assert 'a row of 3 cells under a head of 2' in page(note('| a | b |\n|---|---|\n| `x|y` | z |\n'))[2][0]
    assert page(note('| a | b |\n|---|---|\n| `x\\|y` | z |\n'))[2]==[]

def test_equal_headings_get_labels_of_their_own():
    text = page(note('## Same\n\n```\n# no heading\n```\n\n## Same'))[0][0]['source']
    assert text.count('(02_b-same)=')==1 and text.count('(02_b-same-2)=')==1 and '(02_b-no' not in text

def test_what_is_folded_is_markdown():
    assert '<summary>Hint</summary>\n\nuse `x`\n\n</details>' in page(note('- ask\n<details><summary>Hint</summary>use `x`</details>'))[0][0]['source']

def test_outputs_are_what_a_page_can_show():
    bar = dict(output_type='stream', name='stderr', text='\r 0%|\r 50%|\r100%|'); two = picture(**{'application/vnd.x+json':{}, 'text/plain':'x'})
    got = book.shown([bar, two, picture(**{'application/vnd.x+json':{}}), picture(**{'application/vnd.jupyter.widget-view+json':{}, 'text/plain':'Look()'})])
    assert got[0]['text']=='100%|\n' and [o.get('data') for o in got[1:]]==[{'text/plain':'x'}]

# The reference

MODULE = '''"""What it does"""
# %% auto #0
__all__ = ['LEAST', 'C', 'f']
# %% ../nbs/02_b.ipynb #aa
LEAST = 3 # frames
@dataclass
class C:
    "A thing"
    n:int=1 # how many, pixels
# %% ../nbs/02_b.ipynb #bb
def f(
    x:Tensor, # frames, (T,H,W)
    *more, # others
    deep:bool=False, # look again
)->str: # its name
    "Name it"
    return x # not of the result
@patch
def turn(self:C, by:float)->'C': # the same, turned
    "Turn it"
    return self
@patch
def ask(self:C,
    why:str='', # words
): # an answer
    "Ask it"
@patch
def go(self:Other,
    n:int, # steps
): return n # nothing of the parameters
'''
def test_signatures_with_their_comments(tmp_path):
    (tmp_path/'b.py').write_text(MODULE); at = dict(aa=('02_b-idea','Idea'), bb=('02_b-name','Name'))
    doc,(least,c,f,go) = book.reference(tmp_path/'b.py', at)
    assert (doc,least.value,least.doc,least.at)==('What it does','3','frames',at['aa'])
    assert c.rows==[('n','int','1','how many, pixels')] and f.rows==[('x','Tensor',None,'frames, (T,H,W)'),('*more','',None,'others'),('deep','bool','False','look again')]
    assert f.result==('str','its name') and [(m.name,m.rows,m.result,m.at) for m in c.methods]==[('turn',[('by','float',None,'')],("'C'",'the same, turned'),at['bb']), ('ask',[('why','str',"''",'words')],('','an answer'),at['bb'])]
    assert (go.name,go.rows)==('Other.go',[('n','int',None,'steps')])
    text = book.api_page('b', '02_b-b', '2 · B', doc, [least,c,f,go])
    assert 'py:function} f(x, *more, deep=False)' in text and '| `x` | frames, (T,H,W) | `Tensor` |  |' in text and '[2: Name](#02_b-name)' in text

def test_a_package_that_is_not_the_notebooks_is_refused(tmp_path):
    (tmp_path/'b.py').write_text(MODULE)
    with pytest.raises(book.BookError, match='run nbdev_export'): book.reference(tmp_path/'b.py', dict(aa=('x','X')))

def test_every_public_name_has_its_place():
    "Read from the source; here compared with what nbdev's own list says"
    for path in sorted((ROOT/'deepfake_nb').rglob('*.py')):
        marks = book.cell_marks(path.read_text())
        if not marks: continue
        _,entries = book.reference(path, {i:('l','L') for _,i in marks}); names = {e.name for e in entries}
        public = next((ast.literal_eval(x.value) for x in ast.parse(path.read_text()).body if isinstance(x, ast.Assign) and ast.unparse(x.targets[0])=='__all__'), [])
        assert {*public}<=names and all(e.at for e in entries), path

# What came out

def site(tmp_path, **pages):
    for n,t in pages.items(): (tmp_path/f'{n}.html').write_text(f'<html><body>{t}</body></html>')
    return book.check(tmp_path)

def test_sound_pages_pass(tmp_path):
    bad,outside,n = site(tmp_path, a='<h1 id="top">A</h1><a href="b.html#x">b</a><a href="#top">up</a><a href="https://example.org/p#q">out</a> a/work/b', b='<p id="x"><a href="a.html">a</a>')
    assert bad==[] and dict(outside)=={'https://example.org/p':1} and n==4

@pytest.mark.parametrize('body,says', [('<a href="gone.html">x</a>','gone.html leads nowhere'), ('<a href="b.html#gone">x</a>','no such place'), ('<a href="#gone">x</a>','no such place'), ('<img src="x.jpg">','x.jpg leads nowhere'),
    ('<a href="../a.html">x</a>','leads nowhere'), ('<script src="https://example.org/x.js"></script>','from elsewhere'), ('<pre>in /'+'tmp/x1/a.csv</pre>','a path of a machine')])
def test_faults_are_seen(tmp_path, body, says):
    (tmp_path/'out').mkdir(); (tmp_path/'a.html').write_text('')
    assert any(says in b for b in site(tmp_path/'out', a=body, b='<p id="x">')[0])

def test_an_address_that_does_not_answer_is_named(): assert book.ask('http://127.0.0.1:9/x', 2).startswith('http://127.0.0.1:9/x: ')
