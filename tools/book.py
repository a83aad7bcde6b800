"""Make the book: `make book`. The notebooks are read, never written: a copy that pages can be made of goes to _build/book-src, jupyter-book turns it
into _build/html without running a cell, then every link, anchor and path of what came out is looked at. `--links` asks the addresses outside as well."""
import ast,hashlib,html,importlib.util,io,json,re,shutil,subprocess,sys,time,tokenize,urllib.error,urllib.request
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote,urlsplit

ROOT = Path(__file__).resolve().parent.parent
LIB = 'deepfake_nb'
class BookError(Exception): "What stands between the notebooks and the book"

def read(path): return json.loads(Path(path).read_text())
def source(cell): return ''.join(cell['source'])
def label(name): "'06b_sources' -> '6b'"; return re.match(r'0*(\d+[a-z]?)_', name)[1]
def slug(text): return re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')
def heading(nb): "The title of a notebook"; return next(m[1] for c in nb['cells'] if c['cell_type']=='markdown' and (m := re.search(r'^# (.+)$', source(c), re.M)))

# What is in it, in which order

def notebooks(nbs):
    "Every notebook that is a page, without its suffix"
    return {str(p.relative_to(nbs))[:-6] for p in Path(nbs).glob('[0-9]*.ipynb')}|{f'stages/{p.stem}' for p in Path(nbs).glob('stages/*.ipynb')}

def the_map(nbs):
    "part -> its pages, from the map of index.ipynb: of its tables the one that links to most notebooks, a part a row"
    text = '\n'.join(source(c) for c in read(Path(nbs)/'index.ipynb')['cells'] if c['cell_type']=='markdown')
    rows = lambda table: {re.sub(r'[*`]', '', l.split('|')[1]).strip():links for l in table.splitlines() if (links := re.findall(r'\]\((?:nbs/)?([\w/]+)\.ipynb\)', l))}
    return max(map(rows, re.findall(r'(?:^\|.*\n?)+', text, re.M)), key=lambda r: sum(map(len, r.values())), default={})

def parts(nbs):
    "The parts of the book; the notebooks that a run executes are one of their own"
    got = the_map(nbs); listed = Counter(n for r in got.values() for n in r); there = notebooks(nbs)
    bad = [f'nbs/{n}.ipynb is not on the map of nbs/index.ipynb' for n in sorted(there-{*listed})]
    bad += [f'the map of nbs/index.ipynb has {n}, which is not there' for n in sorted({*listed}-there)]+[f'the map of nbs/index.ipynb has {n} {k} times' for n,k in listed.items() if k>1]
    if bad: raise BookError('\n'.join(bad))
    stages = [n for r in got.values() for n in r if n.startswith('stages/')]
    res = {k:r for k,v in got.items() if (r := [n for n in v if n not in stages])}
    return res|({'stages: the notebooks that a run executes':stages} if stages else {})

def toc(nbs, modules, kept):
    "The table of contents, as sphinx-external-toc reads it"
    pages = lambda names: [dict(file=n) for n in names]
    tail = [('reference', [dict(file='api/index', sections=pages(f'api/{m}' for m in modules)), dict(file='contributing'), dict(file='pod')]), ('appendix: runs that were kept', [dict(file='records/index', sections=pages(kept))])]
    all_parts = [*((k, pages(v)) for k,v in parts(nbs).items()), *tail]
    return dict(format='jb-book', root='index', parts=[dict(caption=k[0].upper()+k[1:], chapters=c) for k,c in all_parts])

# A notebook as a page

def refer(text, name, known, broken):
    "Markdown with 'chapter 12' as a link and links to notebooks as they stand in the book; code, maths and links are left alone"
    up = '../'*name.count('/')
    def number(m): return f'[{m[0]}]({up}{known[m[0]]}.ipynb)' if m[0] in known else m[0]
    def chapters(m):
        if (first := re.search(r'\d+[a-z]?', m[0])[0]) not in known: broken.append(f'{name}: chapter {first}, which is not there')
        return re.sub(r'\d+[a-z]?\b', number, m[0])
    one = r'\b[Cc]hapter \d+[a-z]?\b|\b[Cc]hapters \d+[a-z]?(?:(?:, | and | to | or )\d+[a-z]?)*\b'
    keep = re.split(r'(```.*?```|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$|\[[^\]\n]*\]\([^)\n]*\)|^#+ [^\n]*$)', text, flags=re.S|re.M)
    keep[::2] = [re.sub(one, chapters, s) for s in keep[::2]]
    text = re.sub(r'\]\(nbs/([\w/]+\.ipynb)', rf']({up}\1', ''.join(keep))
    return re.sub(r'\]\((CONTRIBUTING|records/README|runpod/README)\.md', lambda m: f"]({up}{dict(CONTRIBUTING='contributing', **{'runpod/README':'pod'}).get(m[1], 'records/kept')}.md", text)

def torn(text, name):
    "Rows of tables that have more or fewer cells than their head: a bar in code is a bar of the table, unless a backslash stands before it"
    n = lambda row: len(re.findall(r'(?<!\\)\|', row.strip()))
    for table in re.findall(r'^\|.*\n\|[ :|-]+\|[ ]*\n(?:\|.*\n?)*', re.sub(r'```.*?```', '', text, flags=re.S), re.M):
        head,*rows = table.splitlines(); yield from (f'{name}: a row of {n(r)-1} cells under a head of {n(head)-1}: {r[:60]}' for r in rows if n(r)!=n(head))

def folded(text):
    "What is inside <details> is Markdown too, which needs blank lines around it"
    return re.sub(r'[ \t]*<details>\s*<summary>(.*?)</summary>(.*?)</details>', lambda m: f'\n<details><summary>{m[1]}</summary>\n\n{m[2].strip()}\n\n</details>\n', text, flags=re.S)

def labelled(text, name, seen):
    "A label before every heading, so that others can point at it"
    def put(m):
        seen.append((at := f'{name}-{slug(m[2])}'.replace('/', '-'), m[2])); n = sum(l==at for l,_ in seen)
        if n>1: seen[-1] = (at := f'{at}-{n}', m[2])
        return f'({at})=\n{m[1]} {m[2]}'
    keep = re.split(r'(```.*?```)', text, flags=re.S); keep[::2] = [re.sub(r'^(#{1,3}) (.+)$', put, s, flags=re.M) for s in keep[::2]]
    return ''.join(keep)

def directives(src):
    "The directives of a code cell, and what is left without them"
    lines = src.splitlines(True); heads = [l for l in lines if l.startswith('#|')]
    return {h[2:].strip().split(':')[0].split()[0]:h[2:].strip() for h in heads},''.join(l for l in lines if l not in heads).strip('\n')

def shown(outputs):
    "What a page can show of them: no private formats, and of a progress bar its last state"
    said,res = {},[]
    for o in outputs:
        if o['output_type']=='stream': said[o['name']] = said.get(o['name'], '')+''.join(o['text'])
        elif any('widget-view' in k for k in o.get('data', {})): continue # a widget lives in Lab; its chapter shows it as pictures too
        elif data := {k:v for k,v in o.get('data', {}).items() if k.startswith(('image/','text/'))}: res.append(o|dict(data=data))
        elif o['output_type']=='error': res.append(o)
    return [dict(output_type='stream', name=n, text='\n'.join(l.split('\r')[-1] for l in t.replace('\r\n', '\n').strip('\n').split('\n'))+'\n') for n,t in said.items() if t.strip()]+res

TAGS = dict(export='export', exporti='export', cuda='on-a-gpu', eval='not-run')
def page(nb, name, known, broken, title=None, lead=''):
    "The notebook as the book has it, and where its cells are explained: id -> (label, heading)"
    cells,seen,where = [],[],{}; md = lambda text: dict(cell_type='markdown', metadata={}, source=text)
    for i,c in enumerate(nb['cells']):
        src = source(c)
        if c['cell_type']=='markdown':
            broken.extend(torn(src, name))
            if title: src,title = re.sub(r'^# .+$', lambda _: f'# {title}', src, count=1, flags=re.M),None
            cells.append(md(labelled(folded(refer(src, name, known, broken)), name, seen)))
            if lead: cells.append(md(lead)); lead = ''
            continue
        where[c.get('id', i)] = seen[-1] if seen else None
        flags,src = directives(src); out = shown(c.get('outputs', []))
        if 'default_exp' in flags: cells.append(md(f"*Exports* [`{LIB}.{(m := flags['default_exp'].split()[1])}`](#api-{slug(m)})."))
        if 'hide' in flags and not out or not src: continue
        tags = [*c['metadata'].get('tags', []), *(TAGS[f] for f in flags if f in TAGS), *['remove-input']*('hide' in flags)]
        cells.append(dict(cell_type='code', metadata=dict(tags=tags), execution_count=None, source=src, outputs=out))
    for i,c in enumerate(cells): c['id'] = f'c{i}'
    meta = dict(kernelspec=dict(name='python3', display_name='python3', language='python'), language_info=dict(name='python', pygments_lexer='ipython3', file_extension='.py'))
    return dict(cells=cells, metadata=meta, nbformat=4, nbformat_minor=5),where

# The reference, read from the source of the modules: nothing is imported

def notes(src): "line -> its comment"; return {t.start[0]:t.string[1:].strip() for t in tokenize.generate_tokens(io.StringIO(src).readline) if t.type==tokenize.COMMENT}
def cell_marks(src): "(line, id of the notebook's cell) of every mark that nbdev leaves"; return [(i, m[1]) for i,l in enumerate(src.splitlines(), 1) if (m := re.match(r'# %% .*\.ipynb #(\w+)', l))]

def parameters(f, notes):
    "Rows (name, type, default, comment) of a function, and its result as (type, comment)"
    a = f.args; pos = a.posonlyargs+a.args; body = f.body[0].lineno
    given = [None]*(len(pos)-len(a.defaults))+a.defaults
    all_of = [*((p.arg, p, d) for p,d in zip(pos, given)), *([('*'+a.vararg.arg, a.vararg, None)] if a.vararg else []),
        *((p.arg, p, d) for p,d in zip(a.kwonlyargs, a.kw_defaults)), *([('**'+a.kwarg.arg, a.kwarg, None)] if a.kwarg else [])]
    last = max([f.lineno, *((d or p).end_lineno for _,p,d in all_of)]); end = f.returns.end_lineno if f.returns else f.lineno if last==f.lineno else body-1 if body-1>last else None
    def note(node): return notes.get(node.end_lineno, '') if node.end_lineno!=end and node.end_lineno<body else ''
    rows = [(n, ast.unparse(p.annotation) if p.annotation else '', ast.unparse(d) if d else None, note(d or p)) for n,p,d in all_of]
    return rows[bool(rows) and rows[0][0] in ('self','cls'):],(ast.unparse(f.returns) if f.returns else '', notes.get(end, '') if end and end<body else '')

def decorators(node): return [ast.unparse(d) for d in node.decorator_list]
def entry(node, kind, notes, at, **more):
    "What the reference says of one definition"
    rows,result = parameters(node, notes) if isinstance(node, ast.FunctionDef) else ([], ('',''))
    return SimpleNamespace(name=getattr(node, 'name', ''), kind=kind, doc=(ast.get_docstring(node) or '') if kind!='data' else '', rows=rows, result=result, at=at, methods=[], value='', bases=[], **more)

def class_entry(node, notes, at):
    e = entry(node, 'class', notes, at); e.bases = [ast.unparse(b) for b in node.bases]
    for n in node.body:
        if isinstance(n, ast.FunctionDef) and n.name=='__init__': e.rows = parameters(n, notes)[0]
        elif isinstance(n, ast.FunctionDef) and (not n.name.startswith('_') or n.name=='__call__'): e.methods.append(entry(n, 'property' if 'property' in decorators(n) else 'method', notes, at))
        elif isinstance(n, ast.AnnAssign) and any(d.startswith('dataclass') for d in decorators(node)):
            e.rows.append((n.target.id, ast.unparse(n.annotation), ast.unparse(n.value) if n.value else None, notes.get(n.end_lineno, '')))
    return e

def patched(node, notes, at):
    "A method that stands beside its explanation: its class, and the entry"
    how = next(d for d in decorators(node) if d.startswith('patch'))
    return ast.unparse(node.args.args[0].annotation),entry(node, 'property' if 'as_prop=True' in how else 'classmethod' if 'cls_method=True' in how else 'method', notes, at)

def reference(path, where):
    "What a module exports, in order: `where` says for a cell of its chapter in which section it is"
    src = Path(path).read_text(); tree = ast.parse(src); n = notes(src); marks = cell_marks(src); res,late = {},[]
    public = next((ast.literal_eval(x.value) for x in tree.body if isinstance(x, ast.Assign) and ast.unparse(x.targets[0])=='__all__'), [])
    for x in tree.body:
        cell = next((i for l,i in reversed(marks) if l<x.lineno), None); at = where.get(cell)
        if cell in (i for _,i in marks) and not at: raise BookError(f'{path}: a cell #{cell} that its chapter does not have (run nbdev_export)')
        if isinstance(x, ast.ClassDef): res[x.name] = class_entry(x, n, at)
        elif isinstance(x, ast.FunctionDef) and any(d.startswith('patch') for d in decorators(x)): late.append(patched(x, n, at))
        elif isinstance(x, ast.FunctionDef): res[x.name] = entry(x, 'function', n, at)
        elif isinstance(x, (ast.Assign, ast.AnnAssign)):
            for t in (x.targets if isinstance(x, ast.Assign) else [x.target]):
                for name in (t.elts if isinstance(t, ast.Tuple) else [t]):
                    if isinstance(name, ast.Name): res[name.id] = e = entry(x, 'data', n, at); e.name,e.value,e.doc = name.id,'' if isinstance(t, ast.Tuple) else ast.unparse(x.value),n.get(x.end_lineno, '')
    for owner,e in late:
        if e.name.startswith('_') and e.name!='__call__': continue
        if owner in res: res[owner].methods.append(e)
        else: e.name = f'{owner}.{e.name}'; res[e.name] = e; public = [*public, e.name] # a class of another chapter learns something here
    if gone := [k for k in public if k not in res]: raise BookError(f'{path}: exports {", ".join(gone)}, and no definition of it was found')
    return ast.get_docstring(tree) or '',[res[k] for k in public]

def cut(text, n): return text if len(text)<=n else text[:n-1]+'…'
def code(text): return f"`{text}`".replace('|', r'\|') if text else ''
def prose(text):
    "A comment or docstring as Markdown in a table or a paragraph"
    keep = re.split(r'(`[^`]+`)', ' '.join(text.split())); keep[::2] = [re.sub(r'([*_\[\]$~#])', r'\\\1', html.escape(s, quote=False)) for s in keep[::2]]
    return ''.join(keep).replace('|', r'\|')

def signature(e):
    "Names and short defaults; types and the rest are in the table"
    if e.kind in ('data','property'): return ''
    default = lambda d: '' if d is None else '='+(d if len(d)<=24 else '...')
    return '('+', '.join(n+default(d) for n,_,d,_ in e.rows)+')'

def entry_lines(e, depth=0):
    "A definition as a directive of Sphinx, with its table; methods are nested"
    fence = '`'*(5-depth); kind = 'method' if e.kind=='classmethod' else e.kind
    yield f'{fence}{{py:{kind}}} {e.name}{signature(e)}'
    if e.kind=='classmethod': yield ':classmethod:'
    if e.value: yield f':value: {json.dumps(cut(e.value, 90), ensure_ascii=False)}'
    yield ''
    if e.doc: yield prose(e.doc)+'\n'
    if e.bases: yield f"*Is a* {', '.join(map(code, e.bases))}.\n"
    rows = [(code(n), prose(c), code(t), '' if d is None else code(cut(d, 60))) for n,t,d,c in e.rows]
    if any(e.result): rows.append(('*returns*', prose(e.result[1]), code(e.result[0]), ''))
    if rows: yield '\n'.join(['| | | type | default |', '|---|---|---|---|', *('| '+' | '.join(r)+' |' for r in rows)])+'\n'
    for m in e.methods:
        yield from entry_lines(m, depth+1)
        if m.at!=e.at: yield f'*`{m.name}` is explained in [{m.at[1]}](#{m.at[0]}).*\n'
    yield f'{fence}\n'

def api_page(module, chapter, title, doc, entries):
    "The page of one module, by the sections of its chapter"
    at = None; lines = [f'(api-{slug(module)})=', f'# {module}', '', f'> {prose(doc)}', '', f'Chapter [{title}](#{chapter}).', '', f'```{{py:module}} {LIB}.{module}\n```', '']
    for e in sorted(entries, key=lambda e: list(dict.fromkeys(x.at for x in entries)).index(e.at)):
        if e.at!=at: at = e.at; lines += [f'## {at[1]}', '', f'*Explained in [{title.split(" · ")[0]}: {at[1]}](#{at[0]}).*', '']
        lines += entry_lines(e)
    return '\n'.join(lines)+'\n'

# Records: notebooks and numbers of runs that were kept

def run_facts(path):
    "What an executed notebook says about its run"
    nb = read(path); p = nb['metadata'].get('papermill', {}); cells = [c for c in nb['cells'] if c['cell_type']=='code']; out = [o for c in cells for o in c['outputs']]
    return dict(stage=heading(nb), parameters=p.get('parameters', {}), began=(p.get('start_time') or '')[:16].replace('T', ' '), seconds=p.get('duration'), papermill=p.get('version', ''),
        errors=sum(o['output_type']=='error' for o in out), ended=any('metrics+json' in k for o in cells[-1]['outputs'] for k in o.get('data', {})), cells=len(cells),
        sha256=hashlib.sha256(Path(path).read_bytes()).hexdigest())

def run_lead(f, folder):
    "The note at the top of a kept run"
    given = ', '.join(f'`{k}={v}`' for k,v in f['parameters'].items()) or 'none: the defaults'
    when = ', '.join(x for x in (f['began'] and f"begun {f['began']} UTC", f['seconds'] and f"{f['seconds']:,.0f} seconds") if x) or 'when is not in the file'
    return '\n'.join([':::{admonition} The record of a run', f"Executed by papermill {f['papermill']}; {when}. {f['cells']} code cells, {f['errors'] or 'none'} with an error; the last one {'shows' if f['ended'] else 'does not show'} the metrics of the run. Parameters: {given}.",
        f"SHA-256 of the file in the repository, `records/{folder}`: `{f['sha256']}`. Nothing on this page was run again for the book. [What a record is](#records).", ':::'])

def told(m):
    "A number with its interval, or why there is none"
    if m.get('value') is None: return 'withheld' if 'withheld' in m['note'] else 'none'
    return f"{m['value']:.3f}"+(f" [{m['lo']:.3f}, {m['hi']:.3f}]" if m['lo'] is not None else '')

def result_lines(path):
    "A result file (chapter 45) as a section: what was judged on whom, its numbers, its controls, its caveats"
    r = read(path); d = r['detector']
    yield f"## {d['name']} ({path.parent.name}/{path.name})\n\nWeights `{d['sha256'][:16]}`, {d['kind']}; {prose(d['selection'])}.\n"
    for t in r['targets']:
        n = t['counts']; names = [*dict.fromkeys(k for m in t['metrics'].values() for k in m)]
        who = f"{n['real']} real and {n['fake']} fake clips of {n['videos']} videos, {n['people']} person{'s'*(n['people']!=1)}"
        yield f"On **{prose(t['name'])}** ({t['relation']}: {prose(t['why'])}): {who}; threshold {t['threshold']}. In brackets, 95 % intervals.\n"
        lines = [f"| {level}{' (the headline)' if level==t['headline'] else ''} | {' | '.join(told(m[k]) if k in m else '' for k in names)} |" for level,m in t['metrics'].items()]
        yield '\n'.join([f"| counted by | {' | '.join(names)} |", '|---|'+'---|'*len(names), *lines])+'\n'
        rows = [f"| {k} | {c['auc']:.2f} | {prose(c.get('verdict') or '')} |" for k,c in t['controls'].items() if c.get('auc') is not None and 'verdict' in c]
        if rows: yield '\n'.join(['What reads only this, on the same clips:\n', '| control | AUC | |', '|---|---|---|', *rows])+'\n'
    yield '\n'.join(f'* {prose(c)}' for c in r['caveats'])+'\n'

def records(src, known, broken):
    "The appendix: its pages in order, written below `src`"
    out = src/'records'; out.mkdir(parents=True); names,rows = [],[]
    for p in sorted((ROOT/'records').glob('*/*.ipynb')):
        rel = str(p.relative_to(ROOT/'records')); name = f'records/{rel[:-6]}'; f = run_facts(p); folder = Path(rel).parent.name
        nb,_ = page(read(p), name, known, broken, f"Kept run: {f['stage'].split(':')[0]} ({folder}{', '+p.stem if p.stem.isupper() else ''})", run_lead(f, rel))
        write(src/f'{name}.ipynb', json.dumps(nb)); names.append(name); rows.append(f"| [{folder}/{p.stem}]({rel}) | {f['stage']} | {f['began'][:10]} | {f['cells']} |")
    for p in (ROOT/'records').glob('*/*.[jp][pn]g'): write(out/p.relative_to(ROOT/'records'), p.read_bytes())
    text = re.sub(r'^# .*$', '# What was kept, and how to make it again', (ROOT/'records/README.md').read_text(), count=1, flags=re.M)
    write(out/'kept.md', refer(text, 'records/kept', known, broken)); names.append('records/kept')
    judged = [p for p in sorted((ROOT/'records').glob('*/*.json')) if isinstance(r := read(p), dict) and r.get('format')=='deepfake_nb result 1']
    lines = ['# How the kept runs were judged\n', 'Result files of chapter 45, with the scores of every clip beside them in `records/`.\n', *(l for p in judged for l in result_lines(p))]
    write(out/'results.md', refer('\n'.join(lines), 'records/results', known, broken)); names.append('records/results')
    table = ['| page | stage | day | code cells |', '|---|---|---|---|', *rows]
    write(out/'index.md', refer((ROOT/'book/records.md').read_text(), 'records/index', known, broken).replace('RUNS', '\n'.join(table)))
    return names

# The building

def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True); path.write_bytes(data if isinstance(data, bytes) else data.encode())

def sources(src, nbs=ROOT/'nbs', lib=ROOT/LIB):
    "Everything jupyter-book reads, made anew in `src`"
    shutil.rmtree(src, ignore_errors=True); order = [n for p in parts(nbs).values() for n in p]; broken,modules = [],{}
    known = {label(n):n for n in order if '/' not in n}
    for name in ['index', *order]:
        nb = read(nbs/f'{name}.ipynb'); title = heading(nb); title = f'{label(name)} · {title}' if name in known.values() else title
        made,where = page(nb, name, known, broken, title); write(src/f'{name}.ipynb', json.dumps(made))
        for c in nb['cells']:
            if c['cell_type']=='code' and (m := re.search(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M)): modules[m[1]] = (name, title, where)
    rows = []
    for m,(name,title,where) in modules.items():
        doc,entries = reference(lib/(m.replace('.', '/')+'.py'), where); chapter = f'{name}-{slug(title)}'
        write(src/f'api/{m}.md', api_page(m, chapter, title, doc, entries)); rows.append(f'| [`{m}`](#api-{slug(m)}) | {prose(doc)} | [{label(name)}](#{chapter}) | {len(entries)} |')
    write(src/'api/index.md', (ROOT/'book/api.md').read_text().replace('MODULES', '\n'.join(['| module | | chapter | names |', '|---|---|---|---|', *rows])))
    for name,file in (('contributing','CONTRIBUTING.md'),('pod','runpod/README.md')): write(src/f'{name}.md', refer((ROOT/file).read_text(), name, known, broken))
    kept = records(src, known, broken)
    if broken: raise BookError('\n'.join(broken))
    write(src/'_toc.yml', json.dumps(toc(nbs, modules, kept), indent=1))
    shutil.copytree(ROOT/'book/_static', src/'_static'); shutil.copytree(ROOT/'images', src/'images')

def mathjax(to):
    "The formulas are set by MathJax, from files of the book itself: its pages load nothing from elsewhere"
    at = Path(importlib.util.find_spec('sphinx-mathjax-offline').origin).parent/'static/mathjax'
    for p in [at/'tex-chtml.js', *(at/'input/tex/extensions').glob('*.js'), *(at/'output/chtml/fonts').rglob('*.woff')]: write(to/p.relative_to(at), p.read_bytes())

def build(src, out):
    "jupyter-book, where a warning is an error; what may be warned of is in book/_config.yml, with the reason"
    shutil.rmtree(out, ignore_errors=True); exe = Path(sys.executable).parent/'jupyter-book'
    p = subprocess.run([exe,'build',src,'--path-output',out.parent.parent,'--config',ROOT/'book/_config.yml','--toc',src/'_toc.yml','--all','-W','--keep-going'], capture_output=True, text=True)
    if p.returncode or not (out/'index.html').exists():
        said = [re.sub(r'\x1b\[[\d;]*m', '', l).replace(f'{src}/', '') for l in (p.stdout+p.stderr).splitlines() if re.search('WARNING:|ERROR:|[a-z](Error|Exception):', l)]
        raise BookError('\n'.join(said or [p.stdout[-2000:], p.stderr[-2000:]]))

# Looking at what came out

class Page(HTMLParser):
    "Names, links and loaded files of a page; and its text, in which no path of a machine may stand"
    def __init__(self, text): super().__init__(); self.names,self.links,self.loads,self.text = set(),[],[],[text]; self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs); self.names |= {a[k] for k in ('id','name') if a.get(k)}
        if tag=='a' and a.get('href'): self.links.append(a['href'])
        rel = (a.get('rel') or '').split()
        if a.get('src') or tag=='link' and a.get('href') and not {'next','prev','search','index','author','canonical'}&{*rel}: self.loads.append(a.get('src') or a['href'])
        elif tag=='link' and a.get('href'): self.links.append(a['href'])
    def handle_data(self, data): self.text.append(data)

# /tmp/deepfake_nb... is not among them: a pod has its logs there, and the runbook says so. In outputs tools/law.py refuses that too.
def machine_paths(page): return sorted({m[0] for m in re.finditer(r"""(?<![\w.~/-])/(?:home|root|Users|tmp(?!/deepfake_nb)|work)/[^\s'"<>]*""", '\n'.join(page.text))})

def check(out):
    "Everything wrong with the pages below `out`, the links outside with how often they are there, and the links looked at"
    out = Path(out).resolve(); pages = {p:Page(p.read_text()) for p in sorted(out.rglob('*.html')) if '_static' not in p.parts}; bad,outside,n = [],Counter(),0
    for p,page in pages.items():
        at = p.relative_to(out); bad += [f'{at}: shows a path of a machine, {m}' for m in machine_paths(page)]
        for url,load in [*((u, False) for u in page.links), *((u, True) for u in page.loads)]:
            u = urlsplit(url); n += 1
            if u.scheme in ('data','mailto','javascript'): continue
            if u.scheme or u.netloc:
                if load: bad.append(f'{at}: loads {url} from elsewhere')
                else: outside[url.split('#')[0]] += 1
                continue
            to = (p.parent/unquote(u.path)).resolve() if u.path else p
            if to.is_dir(): to = to/'index.html'
            if not to.exists() or out not in to.parents: bad.append(f'{at}: {url} leads nowhere')
            elif u.fragment and to in pages and unquote(u.fragment) not in pages[to].names and u.fragment!='_': bad.append(f'{at}: {url}, and no such place on that page')
    return bad,outside,n

def ask(url, seconds=20):
    "None if the address answers, else what it said"
    try: urllib.request.urlopen(urllib.request.Request(url, headers={'User-Agent':'deepfake_nb book'}), timeout=seconds).close()
    except (OSError, ValueError) as e: return f'{url}: {e}'

def main(links, top=ROOT/'_build'):
    start = time.time(); src,out = top/'book-src',top/'html'
    try:
        sources(src); build(src, out); mathjax(out/'_static/mathjax'); bad,outside,n = check(out)
        if links: bad += [e for u in sorted(outside) if (e := ask(u))]
        if bad: raise BookError('\n'.join(sorted({*bad})))
    except BookError as e: sys.exit(f'{e}\nthe book was not made: {len(str(e).splitlines())} faults')
    size = sum(p.stat().st_size for p in out.rglob('*') if p.is_file())/2**20
    for u,k in sorted(outside.items()): print(f'outside, {"answers" if links else "not asked (make book LINKS=1 does)"}: {u}, {k} times')
    print(f'{len(list(out.rglob("*.html")))} pages, {n:,} links looked at, {len(outside)} addresses outside, {size:.1f} MB, {time.time()-start:.0f} s: {out.relative_to(ROOT)}/index.html')

if __name__=='__main__': main('--links' in sys.argv)
