() => {
  // In the page: the ms from each key to the first frame after its image has loaded.
  const is_first = window.kvSteps === undefined;
  window.kvKey = 0; window.kvSteps = [];
  if (!is_first) return;
  document.addEventListener('keydown', () => { window.kvKey = performance.now(); }, true);
  document.addEventListener('load', ({ target }) => target.matches?.('.kv-picture') && requestAnimationFrame(() => {
    if (window.kvKey) window.kvSteps.push(performance.now() - window.kvKey);
    window.kvKey = 0;
  }), true);
}
