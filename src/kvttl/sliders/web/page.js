// What Jupyter's widgets do not say to a screen reader: whose slider it is, and its value in units.
(() => {
  const label = (row) => row.querySelector('.widget-label')?.textContent.trim();
  const unit = (row) => (row.querySelector(':scope > .widget-label:last-child') ?? {}).textContent;
  const spoken = (handle, row) => {
    const said = handle.getAttribute('aria-valuetext');
    if (said === handle.dataset.kvSaid) return;
    const position = parseFloat(said);  // aria-valuenow has one digit behind the point only
    const value = handle.closest('.kv-log') ? 10 ** position : position;
    const entry = row.querySelector('input[type=number]');
    handle.dataset.kvSaid = `${Number(value.toPrecision(3))} ${entry ? unit(row) ?? '' : ''}`.trim();
    handle.setAttribute('aria-valuetext', handle.dataset.kvSaid);
  };
  const name = () => {
    document.title = 'KV cache TTL kit';
    document.documentElement.lang = 'en';
    for (const row of document.querySelectorAll('.kv-page .widget-inline-hbox, .kv-page .kv-control')) {
      const text = label(row);
      for (const part of row.querySelectorAll('input, select, .noUi-handle')) {
        if (text && !part.getAttribute('aria-label')) part.setAttribute('aria-label', text);
        if (part.matches('.noUi-handle')) spoken(part, row.closest('.kv-control') ?? row);
      }
    }
    for (const line of document.querySelectorAll('.kv-status, .kv-readout')) line.setAttribute('role', 'status');
    for (const image of document.querySelectorAll('img.kv-picture')) {
      image.alt = image.parentElement.querySelector('.kv-readout b')?.textContent ?? '';
    }
  };
  let due = false;
  const soon = () => { if (!due) { due = true; setTimeout(() => { due = false; name(); }, 100); } };
  new MutationObserver((changes) => {
    for (const { target } of changes) {
      if (target.matches?.('.noUi-handle')) spoken(target, target.closest('.kv-control') ?? target.closest('.widget-inline-hbox'));
    }
    soon();
  }).observe(document.body, { subtree: true, childList: true, attributes: true, attributeFilter: ['aria-valuetext'] });
})();
