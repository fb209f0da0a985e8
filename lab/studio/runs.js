// The table of runs. Searching, sorting and selecting happen here, so rows that come later disturb none of them.
const COLUMNS = [
  { by: "name", label: "Run" },
  { by: "experiment", label: "Experiment" },
  { by: "state", label: "State" },
  { by: "progress", label: "Progress", down: true },
  { by: "value", label: "Key metric", down: true },
  { by: "seconds", label: "Duration", down: true },
  { by: "age", label: "Last sign" },
];

function compared(one, other, by) {
  if (by === "value" && one.metric !== other.metric) return one.metric < other.metric ? -1 : 1;
  const [a, b] = [one[by], other[by]];
  if (a === b) return one.started === other.started ? 0 : one.started < other.started ? 1 : -1;
  if (a === null || b === null) return a === null ? 1 : -1;
  return a < b ? -1 : 1;
}

export default {
  props: { rows: Array },
  data: () => ({ columns: COLUMNS, text: "", state: "", experiment: "", by: "", down: false, chosen: [] }),
  computed: {
    states() {
      return [...new Set(this.rows.map((row) => row.state))].sort();
    },
    experiments() {
      return [...new Set(this.rows.map((row) => row.experiment))].sort();
    },
    shown() {
      const words = this.text.toLowerCase().split(/\s+/);
      const has = (row) => `${row.name} ${row.stamp} ${row.experiment} ${row.state} ${row.metric}`.toLowerCase();
      const kept = this.rows.filter(
        (row) =>
          (!this.state || row.state === this.state) &&
          (!this.experiment || row.experiment === this.experiment) &&
          words.every((word) => has(row).includes(word)),
      );
      if (!this.by) return kept;
      const sign = this.down ? -1 : 1;
      return kept.sort((one, other) => sign * compared(one, other, this.by));
    },
    picked() {
      const there = new Set(this.rows.map((row) => row.key));
      return this.chosen.filter((key) => there.has(key));
    },
    all() {
      return this.shown.length > 0 && this.shown.every((row) => this.chosen.includes(row.key));
    },
  },
  methods: {
    sort(column) {
      this.down = this.by === column.by ? !this.down : Boolean(column.down);
      this.by = column.by;
    },
    order(column) {
      return this.by === column.by ? (this.down ? "descending" : "ascending") : "none";
    },
    selectAll() {
      const keys = this.shown.map((row) => row.key);
      this.chosen = this.all ? this.chosen.filter((key) => !keys.includes(key)) : [...new Set([...this.chosen, ...keys])];
    },
  },
  template: `
    <div class="runs">
      <div class="runs-tools" role="search">
        <input v-model="text" type="search" placeholder="Search runs" aria-label="Search runs" class="field runs-search">
        <select v-model="state" aria-label="State" class="field">
          <option value="">all states</option>
          <option v-for="one in states" :key="one">{{ one }}</option>
        </select>
        <select v-model="experiment" aria-label="Experiment" class="field">
          <option value="">all experiments</option>
          <option v-for="one in experiments" :key="one">{{ one }}</option>
        </select>
        <select v-model="by" aria-label="Sort by" class="field runs-order">
          <option value="">newest first</option>
          <option v-for="column in columns" :key="column.by" :value="column.by">by {{ column.label.toLowerCase() }}</option>
        </select>
        <span class="studio-dim" role="status">{{ shown.length }} of {{ rows.length }} runs</span>
        <a class="runs-compare" :class="{ off: picked.length < 2 }" :aria-disabled="picked.length < 2"
           :href="picked.length < 2 ? null : '/compare?runs=' + picked.join(',')">
          Compare{{ picked.length > 1 ? ' ' + picked.length : '' }}
        </a>
      </div>
      <table class="runs-table">
        <thead>
          <tr>
            <th class="runs-pick"><input type="checkbox" :checked="all" @change="selectAll" aria-label="Select all runs that are shown"></th>
            <th v-for="column in columns" :key="column.by" :aria-sort="order(column)">
              <button type="button" @click="sort(column)">{{ column.label }}<span aria-hidden="true">{{
                by === column.by ? (down ? ' ↓' : ' ↑') : '' }}</span></button>
            </th>
          </tr>
        </thead>
        <tbody>
          <tr v-for="row in shown" :key="row.key" :class="{ chosen: chosen.includes(row.key) }">
            <td class="runs-pick"><input type="checkbox" v-model="chosen" :value="row.key" :aria-label="'Select ' + row.name + '/' + row.stamp"></td>
            <td class="runs-name"><a :href="row.address">{{ row.name }}<small>{{ row.stamp }}</small></a></td>
            <td class="runs-experiment">{{ row.experiment }}</td>
            <td class="runs-state"><span class="state" :class="row.state" :title="row.why"><i class="material-icons notranslate"
              aria-hidden="true">{{ row.icon }}</i>{{ row.state }}</span></td>
            <td class="runs-progress">
              <div class="bar" role="progressbar" :aria-valuenow="Math.round(100 * row.progress)" aria-valuemin="0" aria-valuemax="100"
                   :aria-label="'Progress of ' + row.name"><i :style="{ width: 100 * row.progress + '%' }"></i></div>
              <small>{{ row.steps }}</small>
            </td>
            <td class="runs-metric">{{ row.figure }}<small>{{ row.metric }}</small></td>
            <td class="runs-duration">{{ row.duration }}</td>
            <td class="runs-age">{{ row.ago }}</td>
          </tr>
        </tbody>
      </table>
      <p v-if="rows.length && !shown.length" class="studio-dim">No run fits this search.</p>
    </div>`,
};
