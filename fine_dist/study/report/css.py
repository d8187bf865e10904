"""The page's style sheet."""

from __future__ import annotations

CSS = """
:root{--sans:"Inter","Segoe UI","Helvetica Neue",Arial,"Liberation Sans",sans-serif;--ink:#1f2933;--soft:#52606d;
--faint:#7b8794;--line:#e4e7eb;--yes:#0b7285;--yes-bg:#e6f5f7;--no:#c92a2a;--no-bg:#fdeeee;
--so:#b08900;--so-bg:#fdf6e3}
*{box-sizing:border-box}
body{margin:0;background:#fbfbfa;color:var(--ink);font:16px/1.55 var(--sans);-webkit-font-smoothing:antialiased}
main{max-width:1080px;margin:0 auto;padding:56px 28px 80px}
h1{font-size:34px;line-height:1.2;letter-spacing:-.02em;margin:0 0 14px}
h2{font-size:21px;letter-spacing:-.01em;margin:0 0 10px}h3{font-size:15px;margin:22px 0 8px}
p{margin:0 0 14px;max-width:76ch}.lead{font-size:19px;color:var(--soft);max-width:68ch}
.meta,small,figcaption{color:var(--faint);font-size:13.5px;line-height:1.5}
section{margin-top:54px}figure{margin:0}figcaption{margin-top:10px;max-width:92ch}
svg,img{display:block;width:100%;height:auto}section>figure>svg{background:#fff;border:1px solid var(--line);
border-radius:10px;padding:14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:12px;margin-top:30px}
.tiles div{background:#fff;border:1px solid var(--line);border-radius:10px;padding:16px 18px;display:flex;
flex-direction:column}.tiles b{font-size:26px;letter-spacing:-.02em;line-height:1.2;font-variant-numeric:tabular-nums}
.tiles span{font-size:14px;color:var(--soft);margin-top:2px}.tiles small{margin-top:6px;font-size:12.5px}
.promises{display:grid;gap:10px}
.promise{background:#fff;border:1px solid var(--line);border-left:4px solid var(--yes);
border-radius:8px;padding:13px 18px}
.promise.no{border-left-color:var(--no)}.promise.noise{border-left-color:var(--so)}
.claim{display:flex;justify-content:space-between;gap:20px;align-items:baseline}
.verdict{white-space:nowrap;font-size:14px;font-weight:600;color:var(--yes)}.no .verdict{color:var(--no)}
.noise .verdict{color:var(--so)}
.measure{display:flex;flex-wrap:wrap;gap:7px;align-items:center;margin-top:8px;font-size:13.5px}
.measure>span:first-child{width:128px;color:var(--faint)}
.chip{background:var(--yes-bg);color:#084c58;border-radius:6px;padding:2px 10px;font-variant-numeric:tabular-nums}
.chip.no{background:var(--no-bg);color:#8a1c1c}
.chip.noise{background:var(--so-bg);color:#7a5f00}.chip i{font-style:normal;opacity:.65;margin-right:8px}
.promise .meta{margin:8px 0 0;max-width:none}
.claim small{font-weight:400;margin-left:12px}
.missing{margin-top:16px;font-size:14.5px;color:var(--soft);max-width:none}
.missing em{color:var(--faint);font-style:normal}
.cost{font-size:14.5px;color:var(--soft);max-width:none;margin-bottom:6px}
.scroll{overflow-x:auto;background:#fff;border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--faint);font-size:12.5px;line-height:1.3;vertical-align:bottom}
th,td{padding:6px 18px;text-align:right;white-space:nowrap}th{white-space:normal}.t{text-align:left}
tbody tr.first td{border-top:1px solid var(--line)}tbody tr.first td:first-child{font-weight:700}
tbody tr.next td:nth-child(n+2){border-top:1px dotted var(--line)}
.dot{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:8px}
.plain td{padding:4px 14px 4px 0;white-space:normal;vertical-align:top}.plain td:first-child{color:var(--faint)}
.two{display:grid;grid-template-columns:1fr 1fr;gap:36px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:16px}
.card{background:#fff;border:1px solid var(--line);border-radius:10px;padding:12px}
.card img{image-rendering:pixelated;border-radius:4px}.card figcaption{margin-top:8px}
@media (max-width:720px){.two{grid-template-columns:1fr}.claim{flex-direction:column;gap:2px}h1{font-size:27px}}
@media print{body{background:#fff}section{break-inside:avoid}}
"""
