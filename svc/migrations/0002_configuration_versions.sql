-- Every state that a configuration ever had. It outlives the configuration, so it does not refer to it.
CREATE TABLE configuration_versions (
    configuration_id text COLLATE "C" NOT NULL,
    version          integer NOT NULL,
    operation        text NOT NULL,
    application_id   text COLLATE "C" NOT NULL,
    name             varchar(256) NOT NULL,
    comments         varchar(1024),
    config           jsonb NOT NULL,
    recorded_at      timestamptz NOT NULL,
    CONSTRAINT configuration_versions_pkey PRIMARY KEY (configuration_id, version),
    CONSTRAINT configuration_versions_operation_check CHECK (operation IN ('create', 'update', 'delete'))
);

INSERT INTO configuration_versions
SELECT id, version, CASE version WHEN 1 THEN 'create' ELSE 'update' END,
       application_id, name, comments, config, updated_at
FROM configurations;

-- Its argument is the operation to record.
CREATE FUNCTION record_configuration_version() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        OLD.version := OLD.version + 1;
        OLD.updated_at := clock_timestamp();
        NEW := OLD;
    END IF;
    INSERT INTO configuration_versions
    VALUES (NEW.id, NEW.version, TG_ARGV[0], NEW.application_id, NEW.name, NEW.comments, NEW.config, NEW.updated_at);
    RETURN NULL;
END
$$;

CREATE TRIGGER configurations_record_create AFTER INSERT ON configurations
    FOR EACH ROW EXECUTE FUNCTION record_configuration_version('create');
CREATE TRIGGER configurations_record_update AFTER UPDATE ON configurations
    FOR EACH ROW WHEN (NEW.version <> OLD.version) EXECUTE FUNCTION record_configuration_version('update');
CREATE TRIGGER configurations_record_delete AFTER DELETE ON configurations
    FOR EACH ROW EXECUTE FUNCTION record_configuration_version('delete');

CREATE FUNCTION keep_configuration_versions() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND current_setting('config_service.pruning', true) = 'on' THEN
        RETURN NULL;
    END IF;
    RAISE 'configuration_versions is append-only: call prune_configuration_versions() to remove old ones'
        USING ERRCODE = 'restrict_violation';
END
$$;

CREATE TRIGGER configuration_versions_keep BEFORE UPDATE OR DELETE OR TRUNCATE ON configuration_versions
    FOR EACH STATEMENT EXECUTE FUNCTION keep_configuration_versions();

-- Removes what is older than an age and beyond the newest `keep` of its configuration, never the newest itself.
-- Returns how many it removed.
CREATE FUNCTION prune_configuration_versions(older_than interval, keep integer) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    removed bigint;
BEGIN
    PERFORM set_config('config_service.pruning', 'on', true);
    DELETE FROM configuration_versions AS v
    USING (
        SELECT configuration_id, version,
               row_number() OVER (PARTITION BY configuration_id ORDER BY version DESC) AS place
        FROM configuration_versions
    ) AS ranked
    WHERE v.configuration_id = ranked.configuration_id
      AND v.version = ranked.version
      AND ranked.place > greatest(keep, 1)
      AND v.recorded_at < now() - older_than;
    GET DIAGNOSTICS removed = ROW_COUNT;
    PERFORM set_config('config_service.pruning', 'off', true);
    RETURN removed;
END
$$;
