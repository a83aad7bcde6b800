"Run one chapter as `nbdev_test` runs it, then keep its outputs (--save) or compare their text with what is committed (--check)."
import argparse,json,re,sys
from pathlib import Path
import nbdev.test
from nbdev.clean import clean_nb
from nbdev.config import get_config
from execnb.nbio import dict2nb,nb2dict,write_nb

class _Keep(nbdev.test.CaptureShell):
    "The shell of `nbdev_test`, which remembers the notebook that it ran"
    ran = None
    def run_all(self, nb, **kw): _Keep.ran = nb; return super().run_all(nb, **kw)

def outputs(cell):
    "What a cell shows, without what differs from run to run: views of widgets (they need a live kernel) and counters"
    res = []
    for o in cell.get('outputs') or []:
        o = {k:v for k,v in o.items() if k!='execution_count'}
        if 'data' in o: o['data'] = {k:v for k,v in o['data'].items() if 'widget-view' not in k}
        if o['output_type']=='execute_result': o['execution_count'] = None
        if o.get('data',True): res.append(o)
    return res

def text(cell):
    "The text a cell shows; two neighbouring pieces of one stream count as one"
    parts = [''.join(o.get('text') or o.get('data',{}).get('text/plain','')) for o in outputs(cell)]
    return re.sub(r' at 0x[0-9a-f]{6,}', '', '\n'.join(parts)).strip()

def run(path):
    "Execute `path` through `nbdev_test`; its exit status is ours"
    nbdev.test.CaptureShell = _Keep
    nbdev.test.nbdev_test(path=str(path), n_workers=0, do_print=True)
    if _Keep.ran is None: sys.exit(f'{path}: nbdev_test ran nothing')
    return [c for c in _Keep.ran.cells if c.cell_type=='code']

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('path', type=Path); p.add_argument('--save', action='store_true'); p.add_argument('--check', action='store_true')
    a = p.parse_args()
    nb = json.loads(a.path.read_text())
    code,ran,differ = [c for c in nb['cells'] if c['cell_type']=='code'],run(a.path),[]
    if len(code)!=len(ran): sys.exit(f'{a.path}: {len(ran)} cells ran, the file has {len(code)}')
    for i,(c,r) in enumerate(zip(code, ran)):
        if a.check and text(c)!=text(r): differ.append(f'--- cell {i}, committed:\n{text(c)}\n--- now:\n{text(r)}')
        if a.save: c['outputs'],c['execution_count'] = outputs(r),None
    if differ: sys.exit(f'{a.path}: the text outputs of {len(differ)} cells are not what is committed (run `make outputs`, read the difference)\n'+'\n'.join(differ))
    if a.save:
        nb = dict2nb(nb); cfg = get_config()
        clean_nb(nb, allowed_cell_metadata_keys=cfg.allowed_cell_metadata_keys.split(), clean_ids=True)
        write_nb(nb, a.path)

if __name__=='__main__': main()
