"The import law: a chapter imports only from chapters with smaller numbers, so the order of reading is the order of building."
import ast,json,re,sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def number(path):
    "'06b_x.ipynb' -> (6, 'b'): a letter comes after the bare number"
    n,letter = re.match(r'(\d+)([a-z]?)_', path.name).groups()
    return int(n),letter

def chapters(nbs):
    "module -> (number, notebook) of every chapter that exports one"
    res = {}
    for p in sorted(Path(nbs).glob('[0-9]*.ipynb')):
        src = '\n'.join(''.join(c['source']) for c in json.loads(p.read_text())['cells'] if c['cell_type']=='code')
        if m := re.search(r'^#\|\s*default_exp\s+(\S+)', src, re.M): res[m[1]] = (number(p), p)
    return res

def imported(src, lib='deepfake_nb'):
    "Modules of the package that a piece of code imports, in whatever form; cell magics are passed over"
    src = '\n'.join(l for l in src.splitlines() if not re.match(r'\s*[%!]', l))
    for n in ast.walk(ast.parse(src)):
        if isinstance(n, ast.Import): yield from (a.name[len(lib)+1:] for a in n.names if a.name.startswith(lib+'.'))
        elif isinstance(n, ast.ImportFrom):
            if n.level: yield n.module or ''
            elif n.module==lib: yield from (a.name for a in n.names if a.name!='__version__')
            elif (n.module or '').startswith(lib+'.'): yield n.module[len(lib)+1:]

def check(nbs=ROOT/'nbs'):
    "Every import that breaks the law"
    known,bad = chapters(nbs),[]
    for p in sorted(Path(nbs).glob('[0-9]*.ipynb')):
        for c in json.loads(p.read_text())['cells']:
            if c['cell_type']!='code': continue
            for m in imported(''.join(c['source'])):
                if m not in known: bad.append(f'{p.name} imports {m}, which no chapter exports')
                elif known[m][0]>number(p) or (known[m][0]==number(p) and known[m][1]!=p): bad.append(f'{p.name} imports {m} of the later chapter {known[m][1].name}')
    return bad

if __name__=='__main__':
    bad = check(); print('\n'.join(bad) or 'the import law holds'); sys.exit(bool(bad))
