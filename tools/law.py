"The law of the notebooks (CONTRIBUTING.md): sizes of cells and files, a picture and three assertions for each exported idea, the parameters tag."
import json,re,statistics,sys
from pathlib import Path

MEDIAN,P90,EXPORT,EXPORT_P90,KB = 5,15,40,25,500
ASSERTION = re.compile(r'\bassert\b|\btest_(?:eq|ne|close|fail|is|stdout|warns|shuffled|sig|fig_exists)\w*\(|\bexpect_fail\(')

def source(cell): return ''.join(cell['source'])
def n_lines(cell): return len([l for l in source(cell).splitlines() if l.strip() and not l.startswith('#|')])
def is_export(cell): return cell['cell_type']=='code' and bool(re.search(r'^#\|\s*exporti?\b', source(cell), re.M)) and n_lines(cell)>0
def has_picture(cell): return any(m.startswith('image/') for o in cell.get('outputs',[]) for m in o.get('data',{}))
def is_import(cell): return all(re.match(r'(#|from\s|import\s|\s|$)', l) for l in source(cell).splitlines())
def p90(values): return sorted(values)[min(len(values)-1, int(.9*len(values)))]

def sections(cells):
    "Runs of cells, a new one at each `##` heading"
    res = [('top',[])]
    for c in cells:
        if c['cell_type']=='markdown' and (m := re.search(r'^## (.+)', source(c), re.M)): res.append((m[1],[]))
        res[-1][1].append(c)
    return res

def check_section(name, cells):
    "What is missing after the exported cells of one section"
    exp = [i for i,c in enumerate(cells) if is_export(c) and not is_import(c)]
    if not exp: return []
    after = [c for c in cells[exp[0]+1:] if c['cell_type']=='code']
    n = sum(len(ASSERTION.findall(source(c))) for c in after if not is_export(c))
    plumbing = any('# no picture:' in source(c) for c in cells)
    bad = [] if n>=3 else [f'section "{name}": {n} assertions after its exported cells, three are the law']
    if not plumbing and not any(map(has_picture, after)): bad.append(f'section "{name}": no picture after its exported cells (or a comment `# no picture: why`)')
    return bad

def check(path):
    "All that breaks the law in the notebook at `path`"
    nb,path = json.loads(Path(path).read_text()),Path(path)
    code = [c for c in nb['cells'] if c['cell_type']=='code' and source(c).strip()]
    exported,plain = [n_lines(c) for c in code if is_export(c)],[n_lines(c) for c in code if not is_export(c)]
    bad = [] if path.stat().st_size <= KB*1024 else [f'{path.stat().st_size//1024} KB, at most {KB}']
    if plain and statistics.median(plain)>MEDIAN: bad.append(f'median code cell {statistics.median(plain)} lines, at most {MEDIAN}')
    if plain and p90(plain)>P90: bad.append(f'nine in ten code cells have up to {p90(plain)} lines, at most {P90}')
    if exported and max(exported)>EXPORT: bad.append(f'an exported cell of {max(exported)} lines, at most {EXPORT}')
    if exported and p90(exported)>EXPORT_P90: bad.append(f'nine in ten exported cells have up to {p90(exported)} lines, at most {EXPORT_P90}')
    for name,cells in sections(nb['cells']): bad += check_section(name, cells)
    if path.parent.name=='stages' and sum('parameters' in c.get('metadata',{}).get('tags',[]) for c in code)!=1:
        bad.append('a stage notebook has exactly one cell tagged `parameters`')
    for o in (o for c in code for o in c.get('outputs',[])):
        if o['output_type']=='error': bad.append(f"a stored error: {o['ename']}")
        if re.search(r'(^|[\s\'"(])/(home|root|Users|tmp|work)/', json.dumps([o.get('text',''), o.get('data',{}).get('text/plain','')])): bad.append('a path of a machine in an output')
    return [f'{path}: {b}' for b in bad]

def check_whole(paths):
    "The law of the sizes over all cells of all notebooks together, exported or not"
    n = [n_lines(c) for p in paths for c in json.loads(Path(p).read_text())['cells'] if c['cell_type']=='code' and source(c).strip()]
    return [f'all notebooks: {name} code cell {got} lines, at most {most}' for name,got,most in (('median', statistics.median(n), MEDIAN), ('nine in ten, largest', p90(n), P90)) if got>most]

if __name__=='__main__':
    bad = [b for p in sys.argv[1:] for b in check(p)]
    print('\n'.join(bad) or 'the law holds'); sys.exit(bool(bad))
