"Make README.md from nbs/index.ipynb: its text, its code, and its pictures as files beside it. `--check` compares instead."
import base64,json,sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTE = '<!-- made from nbs/index.ipynb by tools/readme.py: edit the notebook -->\n\n'

def pieces(nb):
    "The pieces of the page, and the pictures it needs: name -> bytes"
    parts,pictures = [],{}
    for c in nb['cells']:
        src = ''.join(c['source'])
        if c['cell_type']=='markdown': parts.append(src)
        elif not src.startswith('#| hide'): parts.append(f'```python\n{src}\n```')
        for o in c.get('outputs',[]):
            data = o.get('data',{})
            if 'image/jpeg' in data:
                name = f'images/readme_{len(pictures)}.jpg'
                pictures[name] = base64.b64decode(''.join(data['image/jpeg'])); parts.append(f'![]({name})')
            elif 'text/markdown' in data: parts.append(''.join(data['text/markdown']))
    return NOTE+'\n\n'.join(parts)+'\n',pictures

def main(check):
    text,pictures = pieces(json.loads((ROOT/'nbs/index.ipynb').read_text()))
    files = {'README.md':text.encode(), **pictures}
    stale = [n for n,b in files.items() if not (ROOT/n).exists() or (ROOT/n).read_bytes()!=b]
    if check and stale: sys.exit(f"{', '.join(stale)}: not what nbs/index.ipynb says (run `make outputs`)")
    for n in stale: (ROOT/n).parent.mkdir(exist_ok=True); (ROOT/n).write_bytes(files[n])

if __name__=='__main__': main('--check' in sys.argv)
